"""Jobs as clients see them; several nouns answer with one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.orm import Session

from core.db.session import now
from core.db.tables import Job, Run, Worker
from core.settings import Settings
from server.idempotency import Answer

SILENT_SECONDS = 60.0
"""A worker that was not seen for this long (or for a lease, if that is longer) counts as gone."""

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
    reasons = _why_they_wait(session, queued, settings) if queued else {}
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


def live_workers(session: Session, settings: Settings) -> sa.Select[Worker]:
    """Workers that neither said good-bye nor fell silent."""
    oldest = now(session) - timedelta(seconds=max(SILENT_SECONDS, settings.lease_seconds))
    return sa.select(Worker).where(Worker.stopped_at.is_(None), Worker.seen_at >= oldest)


def _why_they_wait(session: Session, queued: Sequence[Job], settings: Settings) -> dict[str, str]:
    moment = now(session)
    runs = {job.run_id for job in queued if job.run_id is not None}
    status_of_run = dict(session.execute(sa.select(Run.id, Run.status).where(Run.id.in_(runs))).all()) if runs else {}
    capabilities = {name for worker in session.scalars(live_workers(session, settings)) for name in worker.capabilities}
    reasons = {}
    for job in queued:
        run_status = status_of_run.get(job.run_id or "", "active")
        if run_status != "active":
            reasons[job.id] = f"its run is {run_status}"
        elif job.not_before is not None and job.not_before > moment:
            reasons[job.id] = f"a pause of {(job.not_before - moment).total_seconds():.0f} more seconds after a failed attempt"
        elif job.capability not in capabilities:
            reasons[job.id] = f"no worker with capability {job.capability}"
        else:
            reasons[job.id] = "a free slot"
    return reasons
