"""Jobs as clients see them; several nouns answer with one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from core.db.tables import Job
from core.settings import Settings
from server.idempotency import Answer
from server.waiting import explain_jobs

Priority = Annotated[int, Field(ge=-100, le=100)]
"""As requests give it; what belongs to the method itself may lie one lower."""

EXAMPLE_JOB: dict[str, Any] = {
    "id": "job_01m7wgtp6pa1j284j9dq3wthn2",
    "kind": "train",
    "status": "running",
    "run_id": "run_01m7wgs0c4kd1q3v1m3mcd6g2h",
    "iteration": 1,
    "step": "train-student",
    "part": 0,
    "attempt": 1,
    "lost_attempts": 0,
    "max_attempts": 4,
    "capability": "cpu",
    "priority": 0,
    "protocol": 1,
    "progress": {"step": 1200, "steps": 6000},
    "result": None,
    "error": None,
    "cancel_requested_at": None,
    "waiting_for": None,
    "created_at": "2026-11-20T12:00:00.000000Z",
    "started_at": "2026-11-20T12:00:00.400000Z",
    "finished_at": None,
    "resources": {"generation_id": "gen_01m7wgtp77grsvqrmzq6wz5cgs"},
}


class JobView(BaseModel):
    """What was asked for, and how far it is."""

    model_config = {"use_attribute_docstrings": True, "json_schema_extra": {"examples": [EXAMPLE_JOB]}}

    id: str
    kind: str
    """ingest, split, train, label, select, predict or import."""
    status: str
    """queued, running, succeeded, failed or canceled."""
    run_id: str | None
    iteration: int | None
    step: str | None
    part: int | None
    attempt: int
    """How often it was started."""
    lost_attempts: int
    """Attempts that ended badly; an interrupted one costs none."""
    max_attempts: int
    capability: str
    """What a worker must be able to do: `cpu` or `cuda`."""
    priority: int
    """Higher ones come first; its run's, or its pseudo-label set's."""
    protocol: int
    """In which shape its input is written: only workers that read it take the job."""
    progress: dict[str, Any] | None
    """The latest report of the running attempt."""
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    """`class`, `code`, `message` and what else is known of the last failure."""
    cancel_requested_at: datetime | None
    waiting_for: str | None
    """Why a queued job does not run yet."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    resources: dict[str, Any]
    """Ids of what the job makes: dataset_version_id, generation_id, pseudo_label_set_id."""


_COLUMNS = tuple(name for name in JobView.model_fields if name not in ("waiting_for", "resources"))


def show_job(session: Session, job: Job, settings: Settings) -> JobView:
    """One job."""
    return show_jobs(session, [job], settings)[0]


def show_jobs(session: Session, jobs: Sequence[Job], settings: Settings) -> list[JobView]:
    """Jobs of one page; who waits for what is asked once for all of them."""
    queued = [job for job in jobs if job.status == "queued"]
    reasons = explain_jobs(session, queued, settings) if queued else {}
    return [
        JobView(**{name: getattr(job, name) for name in _COLUMNS}, waiting_for=reasons.get(job.id), resources=_resources(job))
        for job in jobs
    ]


def accepted_job(session: Session, job: Job, settings: Settings) -> Answer:
    """The 202 of a job that was just queued."""
    return Answer(show_job(session, job, settings), location=f"/api/v1/jobs/{job.id}")


def _resources(job: Job) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if job.kind == "ingest":
        resources["dataset_version_id"] = job.input["version_id"]
    if job.kind == "split":
        resources["dataset_version_ids"] = {part: target["version_id"] for part, target in job.input["targets"].items()}
    if job.generation_id is not None:
        resources["generation_id"] = job.generation_id
    if job.pseudo_label_set_id is not None:
        resources["pseudo_label_set_id"] = job.pseudo_label_set_id
    return resources
