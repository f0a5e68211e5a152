"""Notices what no timeout ends: an image that a stuck native call never answers, a look at the rows that never returns.

Time is counted in the watchdog's own ticks: a process that was frozen for an hour and thawed has hung for no longer than before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from core.logs import get_log
from server.following import Following
from server.predictor import Predictor

TICK_SECONDS = 0.5
LOOK_HUNG_SECONDS = 15.0
"""Longer than a connection attempt and a slow query take together."""


class Watchdog:
    """A thread that looks at what the others are busy with."""

    def __init__(self, predictor: Predictor, following: Following, *, hung_seconds: float) -> None:
        self._predictor = predictor
        self._following = following
        self._hung_seconds = hung_seconds
        self._seen: dict[tuple[str, int], int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_watching, name="watchdog", daemon=True)
        self.on_hung: Callable[[], None] = lambda: None
        """Called at each tick while the predictor hangs; a process of its own ends itself here."""
        self.hung: str | None = None
        """Why the predictor is taken for hung."""

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _keep_watching(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            self.tick()

    def tick(self) -> None:
        """See who is still busy with the same thing as before."""
        busy = [("image", number) for number in self._predictor.busy_with()]
        look = self._following.look_in_progress
        if look is not None:
            busy.append(("look", look))
        self._seen = {thing: self._seen.get(thing, -1) + 1 for thing in busy}
        self._judge_predictor()
        looks = self._seconds_of("look")
        self._following.keep_looking(hung=looks >= LOOK_HUNG_SECONDS)

    def _seconds_of(self, kind: str) -> float:
        return TICK_SECONDS * max((ticks for (of, _), ticks in self._seen.items() if of == kind), default=0)

    def _judge_predictor(self) -> None:
        seconds = self._seconds_of("image")
        if seconds < self._hung_seconds:
            self.hung = None
            return
        if self.hung is None:
            self.hung = f"an image has been in work for {seconds:g} s, and {self._predictor.num_inside} are inside"
            get_log().error("predictor.hung", why=self.hung)
        self.on_hung()
