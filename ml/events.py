"""What ml reports while it works, and the two plain arguments through which it does.

Every long function takes `on_event`, called with one `Event`, and `should_stop`, asked between steps. Both are cheap:
an event holds plain numbers already on the host, never a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal["stage", "progress", "metric", "checkpoint", "warning"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened.

    stage: `data = {"stage": "training" | "labeling" | "selecting" | "evaluating" | "exporting" | "ingesting"}`
    progress: `done`, `total`, `unit` ("images" | "steps" | "files" | "rows"), `images_per_second`, optional `eta_seconds`;
              `stage` only where it speaks of a detour, as a look at validation in the middle of a training is one
    metric: `step`, and any of `loss`, `loss_labeled`, `loss_unlabeled`, `learning_rate`, `validation_top1`, ...
    checkpoint: `step`, `path`
    warning: `code` (constant, dotted), `message`
    """

    kind: EventKind
    data: dict[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def ignore(_event: Event) -> None:
    """Drop the event: the `on_event` of a caller that does not care."""


def never() -> bool:
    """Answer False: the `should_stop` of a caller that never stops."""
    return False
