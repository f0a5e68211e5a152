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
        self.num_doubtful = 0
        """Items at the front that may be in the database although their commit was reported as failed."""
        self._num_written = 0
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
            new = self.items[self.num_doubtful :]
            self.items[self.num_doubtful :] = [item for number, item in enumerate(new) if item[0] != "metric" or number % 2]

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

    def written(self) -> None:
        """Everything is in the database now."""
        self._num_written += len(self.items)
        self.items.clear()
        self.num_doubtful = 0
        self.progress = self.phase = self.runtime = None

    def doubt(self) -> None:
        """The database went away while the items were written: when the answer to the commit was lost, they are there."""
        self.num_doubtful = self.num_doubtful or len(self.items)

    def find_out(self, num_there: int) -> None:
        """The database holds `num_there` items of this attempt: those that were in doubt are among them, or were never written."""
        del self.items[: max(0, num_there - self._num_written)]
        self._num_written = num_there
        self.num_doubtful = 0
