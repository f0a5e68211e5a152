"""What a running attempt says, gathered between two transactions, so that a fast training costs at most one a second."""

from __future__ import annotations

import time
from typing import Any

from core.db.jobs import step_of

FLUSH_SECONDS = 1.0
PROGRESS_EVENT_SECONDS = 2.0
"""Progress is overwritten in the job's row; its history in the event stream is kept this coarse."""
MOST_WAITING = 5000
PHASES_OF_STAGES = {"training": "training", "evaluating": "evaluating", "exporting": "exporting"}


class Reports:
    """Lines of one attempt that wait to be written."""

    def __init__(self) -> None:
        self.heard_at = time.monotonic()
        """When the attempt last said anything: an attempt that is silent for too long is taken for hung."""
        self.items: list[tuple[str, dict[str, Any]]] = []
        self.progress: dict[str, Any] | None = None
        self.phase: str | None = None
        self.runtime: dict[str, Any] | None = None
        self.step: int | None = None
        """Where the training was heard last; None outside of it."""
        self._stage: str | None = None
        self._told: dict[str, Any] | None = None
        self._progress_at = float("-inf")

    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.items and self.progress is None and self.phase is None and self.runtime is None

    def take(self, message: dict[str, Any]) -> None:
        """Note one line of the attempt."""
        self.heard_at = time.monotonic()
        if message["type"] == "runtime":
            self.runtime = message["runtime"]
        if message["type"] != "event":
            return
        kind, data = message["kind"], message["data"]
        if kind == "progress":
            self._note_progress(data)
            return
        if kind == "stage":
            self._stage = data["stage"]
            self.phase = PHASES_OF_STAGES.get(data["stage"], self.phase)
        self.items.append((kind, data))
        if len(self.items) > MOST_WAITING:
            # The database is away for long: of the curves every second point will do.
            self.items = [item for number, item in enumerate(self.items) if item[0] != "metric" or number % 2]

    def _note_progress(self, data: dict[str, Any]) -> None:
        if "stage" in data:
            # A detour, such as a look at validation: a sign of life, but not how far the job is.
            return
        self.progress = {"stage": self._stage, **data}
        self.step = step_of(self.progress)
        now, ends = time.monotonic(), data.get("done") == data.get("total") and self.progress != self._told
        if ends or now - self._progress_at >= PROGRESS_EVENT_SECONDS:
            self._progress_at, self._told = now, self.progress
            self.items.append(("progress", self.progress))

    def written(self, num_items: int) -> None:
        """The first `num_items` items and everything else are in the database now."""
        del self.items[:num_items]
        self.progress = self.phase = self.runtime = None
