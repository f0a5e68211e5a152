"""What an attempt does, one module a kind: `run(work)` builds a task of ml, calls ml, and says which files it made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ml.config import RuntimeConfig
from ml.events import OnEvent, ShouldStop

MODULES = {
    "ingest": "workers.jobs.ingest",
    "split": "workers.jobs.split",
    "train": "workers.jobs.train",
    "label": "workers.jobs.label",
    "select": "workers.jobs.select",
    "predict": "workers.jobs.predict",
    "import": "workers.jobs.import_generation",
}
"""Imported on use: only some of them need torch, which takes seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One attempt, as the child gets it."""

    input: dict[str, Any]
    """What `workers.inputs` resolved: paths instead of ids."""
    directory: Path
    """The job's own folder; what an earlier attempt left there is still there."""
    halve_micro_batch: bool
    """The attempt before ran out of memory."""
    capabilities: tuple[str, ...]
    """What the worker may use; `auto` means CUDA only where it is among them."""
    on_event: OnEvent
    should_stop: ShouldStop
    on_runtime: Callable[[RuntimeConfig], None]
    """Tell the supervisor the resolved runtime; the first of a run is kept for all its jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What an attempt leaves behind."""

    files: dict[str, Path]
    result: dict[str, Any]
    """JSON-able."""


class JobModule(Protocol):
    """Each module of MODULES."""

    def run(self, work: Work) -> Made:
        """Do it; raises what ml raises."""
