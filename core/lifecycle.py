"""What may happen, as data. core/db makes it happen in one UPDATE each; CHECK constraints and docs/glossary.md repeat the words.

A job has a *status*, an iteration a *phase*, a run a status of its own; their product is never written out. A wish
(`cancel_requested_at`) is a field, not a status.
"""

from __future__ import annotations

JOB_STATUSES = ("queued", "running", "succeeded", "failed", "canceled")
JOB_TERMINAL = ("succeeded", "failed", "canceled")
JOB_MOVES: dict[str, tuple[str, ...]] = {
    "queued": ("running", "canceled"),
    # Back to queued: the lease expired, the attempt was interrupted, or a retryable error.
    "running": ("queued", "succeeded", "failed", "canceled"),
    "succeeded": (),
    # Back to queued: a person asked for a retry.
    "failed": ("queued",),
    "canceled": ("queued",),
}

JOB_KINDS = ("ingest", "split", "train", "label", "select", "predict", "import")
STEPS = ("train-teacher", "label", "select", "train-student", "train-control")

PHASES = ("labeling", "selecting", "training", "evaluating", "exporting", "done", "failed", "canceled")
PHASE_TERMINAL = ("done", "failed", "canceled")

RUN_STATUSES = ("active", "paused", "completed", "failed", "canceled")
RUN_MOVES: dict[str, tuple[str, ...]] = {
    "active": ("paused", "completed", "failed", "canceled"),
    "paused": ("active", "canceled"),
    # Back to active: one more iteration was asked for, or a failed job was retried.
    "completed": ("active",),
    "failed": ("active", "canceled"),
    "canceled": (),
}

RUN_ENDED = ("completed", "failed", "canceled")
"""Nothing of such a run is done unless somebody asks for it; only then may it be deleted."""

VERSION_STATUSES = ("pending", "ready", "failed")
SET_STATUSES = ("labeling", "selecting", "ready", "failed", "canceled")
SET_ENDED = ("ready", "failed", "canceled")
GENERATION_ROLES = ("teacher", "student", "control", "imported")

ERROR_CLASSES = ("retryable", "permanent", "resource")
"""retryable: lost, storage unavailable. permanent: bad recipe, damaged data. resource: out of memory; one retry, half the micro-batch."""

SCOPES = (
    "datasets:read",
    "datasets:write",
    "runs:read",
    "runs:write",
    "jobs:read",
    "jobs:write",
    "generations:read",
    "generations:write",
    "promote",
    "predict",
    "admin",
)


def may_move(moves: dict[str, tuple[str, ...]], old: str, new: str) -> bool:
    """Say whether the table allows this move."""
    return new in moves[old]


def sources_of(moves: dict[str, tuple[str, ...]], new: str) -> tuple[str, ...]:
    """Every state from which `new` may be reached: what an UPDATE puts into its WHERE."""
    return tuple(old for old, targets in moves.items() if new in targets)
