"""Who runs jobs, and how many wait for whom and why: read from the database, so that it is true with and without a broker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from core.db import workers as rows
from core.db.tables import Job, Worker
from server.dependencies import Services, ServicesDep, make_router
from server.openapi import problems
from server.pages import Page, PageDep, read_page
from server.waiting import Code, Fleet, Reason, count_queued, explain_queues, live_workers, read_fleet

router = make_router("workers")


class DeviceView(BaseModel):
    """An accelerator of a worker's host."""

    kind: str
    name: str | None
    memory_bytes: int | None


class HostView(BaseModel):
    """What a worker said of its host and its packages. Null is what it could not find out, or what an older version did not say."""

    devices: list[DeviceView] = []
    num_cores: int | None = None
    memory_bytes: int | None = None
    python: str | None = None
    torch: str | None = None
    torchvision: str | None = None
    timm: str | None = None
    queues: list[str] = []


class WorkerView(BaseModel):
    """A process that runs attempts, as it last described itself."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    """Host (or the given name), process id, and when that process began: two workers never have one name on one host."""
    host: str
    pid: int
    capabilities: list[str]
    slots: int
    version: str
    protocol: int
    """The newest shape of a job's input that it reads; it takes no job of a newer one."""
    code_digest: str | None
    """Workers with the same digest run the same code."""
    facts: HostView
    started_at: datetime
    seen_at: datetime
    draining_at: datetime | None
    """Since when it takes no jobs and only finishes what it has; null while it takes some."""
    stopped_at: datetime | None
    alive: bool
    """False when it said good-bye or was not seen for a minute."""
    jobs: list[str]
    """Ids of the jobs it runs now."""


class WaitReason(BaseModel):
    """One reason why jobs of a queue wait."""

    code: Code
    message: str
    jobs: int
    """How many wait for it."""


class QueueView(BaseModel):
    """What waits for one capability, and why."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    capability: str
    waiting: int
    running: int
    workers: int
    """Live workers with this capability."""
    draining: int
    """Those among them that take no jobs."""
    slots: int
    """Attempts that they run at a time, together."""
    free_slots: int
    """Those that could take a job now."""
    reasons: list[WaitReason]
    """Why its jobs wait, the most frequent reason first."""


@router.get("/workers", summary="List workers")
def list_workers(services: ServicesDep, page: PageDep) -> Page[WorkerView]:
    """Newest first, stopped ones included."""
    cursors = services.cursors
    with services.database.reading() as session:
        found, cursor = read_page(session, sa.select(Worker), Worker.id, page, cursors=cursors, listing="workers")
        return Page(items=_show(session, services, found), next_cursor=cursor)


@router.get("/workers/{worker_id}", summary="Read a worker", responses=problems(404))
def read_worker(worker_id: str, services: ServicesDep) -> WorkerView:
    """With the jobs that it runs."""
    with services.database.reading() as session:
        return _show(session, services, [rows.get_worker(session, worker_id)])[0]


@router.post("/workers/{worker_id}/drain", summary="Drain a worker", responses=problems(404, 409))
def drain_worker(worker_id: str, services: ServicesDep) -> WorkerView:
    """It finishes what it runs and takes no more, so that it can be stopped without interrupting anything. Twice changes nothing."""
    with services.database.transaction() as session:
        return _show(session, services, [rows.drain_worker(session, worker_id)])[0]


@router.post("/workers/{worker_id}/resume", summary="Resume a draining worker", responses=problems(404, 409))
def resume_worker(worker_id: str, services: ServicesDep) -> WorkerView:
    """It takes jobs again. Twice changes nothing."""
    with services.database.transaction() as session:
        return _show(session, services, [rows.resume_worker(session, worker_id)])[0]


def _show(session: Session, services: Services, found: list[Worker]) -> list[WorkerView]:
    alive = {worker.id for worker in session.scalars(live_workers(session, services.settings))}
    running = _running_jobs(session, [worker.name for worker in found])
    names = set(WorkerView.model_fields) - {"alive", "jobs", "facts"}
    return [
        WorkerView(
            **{name: getattr(worker, name) for name in names},
            facts=HostView.model_validate(worker.facts or {}),
            alive=worker.id in alive,
            jobs=running[worker.name],
        )
        for worker in found
    ]


def _running_jobs(session: Session, names: list[str]) -> dict[str, list[str]]:
    running: dict[str, list[str]] = defaultdict(list)
    query = sa.select(Job.lease_holder, Job.id).where(Job.status == "running", Job.lease_holder.in_(names)).order_by(Job.id)
    for name, job_id in session.execute(query):
        running[name or ""].append(job_id)
    return running


@router.get("/queues", summary="What waits, by capability, and why")
def list_queues(services: ServicesDep) -> Page[QueueView]:
    """A queue with jobs and no worker that takes them is why nothing happens."""
    with services.database.reading() as session:
        counts = services.queued.read(lambda: count_queued(session))
        fleet = read_fleet(session, services.settings)
        reasons = explain_queues(fleet, counts)
        query = sa.select(Job.capability, sa.func.count()).where(Job.status == "running").group_by(Job.capability)
        running: dict[str, int] = dict(session.execute(query).all())
    names = {*reasons, *running, *(name for worker in fleet.workers for name in worker.capabilities)}
    return Page(items=[_queue(name, fleet, reasons.get(name, {}), running.get(name, 0)) for name in sorted(names)])


def _queue(capability: str, fleet: Fleet, reasons: Mapping[Reason, int], running: int) -> QueueView:
    able = fleet.able(capability)
    found = sorted(reasons.items(), key=lambda one: (-one[1], one[0].code))
    views: list[dict[str, Any]] = [{"code": reason.code, "message": reason.message, "jobs": number} for reason, number in found]
    return QueueView(
        capability=capability,
        waiting=sum(reasons.values()),
        running=running,
        workers=len(able),
        draining=sum(worker.draining_at is not None for worker in able),
        slots=sum(worker.slots for worker in able),
        free_slots=fleet.free_slots(able),
        reasons=[WaitReason(**view) for view in views],
    )
