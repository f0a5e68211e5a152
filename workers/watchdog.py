"""Notices that Celery's consumer has stopped consuming, as it can after Redis was away, and ends the worker so that a fresh one starts.

Nothing is lost while it is deaf, because its slots look for themselves; but they look seldom, and hints that it should take lie in Redis.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from core.logs import get_log
from core.queue import HintBox

LOOKS = 6
"""How often it looks within its patience."""


class Watchdog:
    """A thread that looks at the oldest hint of each capability. One that stays while a slot is idle all the time was heard by nobody."""

    def __init__(
        self,
        box: HintBox,
        capabilities: Iterable[str],
        *,
        num_idle_slots: Callable[[], int],
        patience_seconds: float,
        on_deaf: Callable[[], None],
    ) -> None:
        self._box = box
        self._num_idle_slots = num_idle_slots
        self._patience_seconds = patience_seconds
        self._on_deaf = on_deaf
        self._stopping = threading.Event()
        self._oldest: dict[str, tuple[bytes, float]] = dict.fromkeys(capabilities, (b"", 0.0))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._patience_seconds / LOOKS):
            for capability in self._oldest:
                seconds = self.look(capability)
                if seconds > self._patience_seconds:
                    get_log().error("worker.consumer_stopped", capability=capability, hint_lay_seconds=round(seconds, 1))
                    self._on_deaf()
                    return

    def look(self, capability: str) -> float:
        """For how long the oldest hint has lain there before this worker's idle slots; 0 when that is no wonder."""
        now = time.monotonic()
        try:
            oldest = self._box.find_oldest(capability)
        except OSError:
            # Nobody hears anything now. Afterwards Celery needs its time to connect again.
            oldest = None
        before, since = self._oldest[capability]
        if oldest is None or self._num_idle_slots() == 0:
            oldest, since = b"", now
        elif oldest != before:
            since = now
        self._oldest[capability] = (oldest, since)
        return now - since
