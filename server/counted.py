"""Counts of many rows, shown again for a while: however often somebody asks, counting takes a fiftieth of the time at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

QUICK_SECONDS = 0.02
"""What was counted in less is counted anew each time."""
SHOWN_FOR = 50.0
"""Times as long as counting took."""


class Counted(Generic[T]):
    """The latest count of one thing; who asks while it is being counted waits for it."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._good_until = float("-inf")
        self._found: T | None = None

    def read(self, count: Callable[[], T]) -> T:
        """What `count` finds, or what it found before when that took long and was not long ago."""
        with self._lock:
            if self._found is None or self._clock() >= self._good_until:
                started = self._clock()
                self._found = count()
                seconds = self._clock() - started
                self._good_until = self._clock() + (SHOWN_FOR * seconds if seconds >= QUICK_SECONDS else 0.0)
            return self._found
