"""`celery -A tests.workers.deaf_consumer worker`: a worker whose consumer, once it is ready, consumes nothing. Its loop goes on turning."""

from __future__ import annotations

from typing import Any

from celery import signals

from workers.app import app, settings

__all__ = ["app"]


@signals.worker_ready.connect
def become_deaf(sender: Any, **_: Any) -> None:
    """What a consumer was seen to do after its connection to Redis had been lost."""
    if settings.worker_name == "deaf":
        sender.task_consumer.cancel_by_queue("cpu")
