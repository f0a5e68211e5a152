"""`celery -A tests.workers.hasty_consumer worker`: its consumer looks for a lost broker a hundred times a second, not every half minute."""

from __future__ import annotations

from typing import Any

import kombu

from workers.app import app

__all__ = ["app"]

_patiently = kombu.Connection.ensure_connection


def _hastily(self: kombu.Connection, *arguments: Any, **named: Any) -> Any:
    return _patiently(self, *arguments, **named, interval_start=0.01, interval_step=0.0, interval_max=0.01)


kombu.Connection.ensure_connection = _hastily
