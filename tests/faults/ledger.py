"""What the service has accepted, noted outside of it: the runner's own memory, which no fault reaches."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Accepted:
    """One request that was answered with 202."""

    key: str
    """Its Idempotency-Key."""
    noun: str
    """ingest, split, import, set or run."""
    id: str
    """Of the job, the set or the run."""
    body: dict[str, Any]
    sent: int = 1
    """How often it was sent until it was answered, and then once more."""
    cancel_asked: bool = False
    may_fail: str | None = None
    """Code of the error that it is to end with, when a fault took care of that."""


@dataclass(slots=True)
class Move:
    """A promotion that was answered with 200."""

    version: int
    generation_id: str


@dataclass(slots=True)
class Ledger:
    """Filled by the load's threads."""

    accepted: list[Accepted] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    """Answers that must never be given."""
    versions_wanted: dict[str, int] = field(default_factory=dict)
    """Dataset → versions that were asked for."""
    predictions: dict[str, int] = field(default_factory=dict)
    """Status (or `unreachable`) → answers of /predict."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, one: Accepted) -> Accepted:
        with self.lock:
            self.accepted.append(one)
        return one

    def complain(self, text: str) -> None:
        with self.lock:
            self.complaints.append(text)

    def count_prediction(self, status: str) -> None:
        with self.lock:
            self.predictions[status] = self.predictions.get(status, 0) + 1

    def nouns(self) -> dict[str, int]:
        """How much of what was accepted."""
        with self.lock:
            names = [one.noun for one in self.accepted]
        return {name: names.count(name) for name in sorted(set(names))}
