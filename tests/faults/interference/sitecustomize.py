"""Imported by Python itself at the start of every process of a chaos run: its commits, its disk and its clock fail when asked to.

The control file named by CHAOS_CONTROL says what is wrong now: {"commit_lost": probability, "disk_full": true, "clock_seconds": 3600}.
The product's code stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import signal
import sqlite3
import sqlite3.dbapi2
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.05
_monotonic, _time, _time_ns, _fsync, _connect = time.monotonic, time.time, time.time_ns, os.fsync, sqlite3.connect


class _Control:
    """The control file, read again when it has changed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._looked_at = float("-inf")
        self._changed_at = 0
        self._wishes: dict[str, Any] = {}
        self._chance = random.Random(f"{os.environ.get('CHAOS_SEED')} {path} {os.getpid()}")

    def get(self, name: str) -> Any:
        now = _monotonic()
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            try:
                changed_at = os.stat(self._path).st_mtime_ns
                if changed_at != self._changed_at:
                    with open(self._path, encoding="utf-8") as file:
                        self._wishes = json.load(file)
                    self._changed_at = changed_at
            except (OSError, ValueError):
                pass
        return self._wishes.get(name)

    def draw(self, name: str) -> bool:
        wish = self.get(name)
        return bool(wish) and self._chance.random() < wish

    def note(self, effect: str) -> None:
        """Tell the runner that it happened."""
        descriptor = os.open(f"{self._path}.effects", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, f"{effect}\n".encode())
        os.close(descriptor)


def _install(control: _Control) -> None:
    class Connection(sqlite3.Connection):
        def commit(self) -> None:
            writes = self.in_transaction
            if writes and control.get("disk_full"):
                control.note("disk_full")
                raise sqlite3.OperationalError("database or disk is full")
            super().commit()
            if writes and control.draw("commit_lost"):
                control.note("commit_lost")
                raise sqlite3.OperationalError("disk I/O error")

    def connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        return _connect(*arguments, **{"factory": Connection, **named})

    def fsync(descriptor: Any) -> None:
        if control.get("disk_full"):
            control.note("disk_full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _fsync(descriptor)

    sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[assignment]
    os.fsync = fsync
    time.time = lambda: _time() + (control.get("clock_seconds") or 0)
    time.time_ns = lambda: _time_ns() + int((control.get("clock_seconds") or 0) * 1e9)


if "CHAOS_CONTROL" in os.environ:
    if os.environ.get("CHAOS_RUNNER") == str(os.getppid()):
        # A runner that is killed leaves nothing behind.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _install(_Control(os.environ["CHAOS_CONTROL"]))
