"""How large a simulation is, what its processes share, and what each of them writes down."""

from __future__ import annotations

import json
import multiprocessing as mp
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from core.settings import Settings

SHARD_SIZE = 10_000
WORK_SECONDS = 7.0
SPAWN = mp.get_context("spawn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is simulated."""

    seed: int = 0
    shards: int = 30_000
    workers: int = 200
    processes: int = 6
    work_seconds: float = WORK_SECONDS
    """Pretended work of a usual shard."""
    report_seconds: float = 5.0
    """How often pretended work says how far it is. Real work may do so every second; two cores are not enough for 200 that do."""
    lease_seconds: float = 30.0
    poll_seconds: float | None = None
    """How often an idle worker looks by itself; None: as a real one."""
    restart_seconds: float = 2.0
    """A worker that died comes back after this long, as another one."""
    calm_seconds: float = 20.0
    """At half of the progress the workers pause for this long: reads are measured without them."""
    read_pause_seconds: float = 0.02
    limit_seconds: float = 1500.0
    """A run that has not ended by then has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What all processes of a simulation hold together."""

    plan: Plan
    settings: Settings
    directory: Path
    stored: dict[str, Any]
    """{digest, num_bytes} of the one tiny file that stands for all files."""
    begin: Event = field(default_factory=SPAWN.Event)
    """Everybody is there: the workers begin."""
    stop: Event = field(default_factory=SPAWN.Event)
    pause: Event = field(default_factory=SPAWN.Event)
    done: Any = field(default_factory=lambda: SPAWN.Value("i", 0))
    """Shards that are labeled."""
    ready: Any = field(default_factory=lambda: SPAWN.Value("i", 0))
    """Processes that have begun."""


@dataclass(slots=True)
class Notes:
    """What one process saw: (what, when, seconds), and counts."""

    times: list[tuple[str, float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        """One more, from any thread."""
        with self._lock:
            self.counts[what] += 1

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note how long the block takes."""
        at, started = time.time(), time.perf_counter()
        yield
        self.times.append((what, at, time.perf_counter() - started))

    def __getstate__(self) -> dict[str, Any]:
        return {"times": self.times, "counts": self.counts, "errors": self.errors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.times, self.counts, self.errors, self._lock = state["times"], state["counts"], state["errors"], threading.Lock()

    def write(self, path: Path) -> None:
        """For the process that began all others."""
        path.write_text(json.dumps({"times": self.times, "counts": self.counts, "errors": self.errors}), encoding="utf-8")

    def add(self, path: Path) -> None:
        """What another process wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        self.times += [(what, at, seconds) for what, at, seconds in found["times"]]
        self.counts.update(found["counts"])
        self.errors += found["errors"]
