"""Is the worker of this machine, or container, alive? Answered from a file that the worker touches, without its database or broker.

A database that is away must not get workers restarted that wait for it. So the file says only that the process is there and its
threads turn: a frozen process and one that hangs in a dead connection fall silent.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from workers.processes import boot_identity, start_ticks

SILENT_SECONDS = 60.0


class SignOfLife:
    """One worker's file. Its time of change is the machine's uptime: no clock that somebody sets, no room on a full disk."""

    def __init__(self, directory: Path, worker_id: str) -> None:
        self._path = directory / f"{worker_id}.json"

    def begin(self) -> None:
        """Say which process this is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        who = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "boot_id": boot_identity()}
        aside = self._path.with_suffix(".incoming")
        aside.write_text(json.dumps(who), encoding="utf-8")
        _touch(aside)
        os.replace(aside, self._path)

    def renew(self) -> None:
        """The worker is still there."""
        _touch(self._path)

    def end(self) -> None:
        """The worker said good-bye."""
        self._path.unlink(missing_ok=True)


def find_problem(directory: Path) -> str | None:
    """What is wrong with the workers in this space of process ids, in one line; None when there is one and none is silent."""
    ages = [(path.stem, age) for path in sorted(directory.glob("*.json")) if (age := _age_of(path)) is not None]
    if not ages:
        return f"no worker of this machine is alive, as far as {directory} tells"
    silent = [f"worker {name} has been silent for {age:.0f} seconds" for name, age in ages if age > SILENT_SECONDS]
    return "; ".join(silent) or None


def _age_of(path: Path) -> float | None:
    """How long the worker has been silent; None when it is not here: dead, of another container, or of another boot."""
    try:
        who: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        touched = path.stat().st_mtime
    except (OSError, ValueError):
        # It said good-bye in this moment.
        return None
    here = who.get("boot_id") == boot_identity() and who.get("start_ticks") == start_ticks(int(who.get("pid", 0)))
    return _uptime() - touched if here else None


def _touch(path: Path) -> None:
    moment = _uptime()
    os.utime(path, (moment, moment))


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
