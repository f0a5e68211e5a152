"""Who runs jobs, and how many wait for whom: read from the database, so that it is true with and without a broker."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.orm import Session

from core.db.tables import Job, Worker
from server.dependencies import ServicesDep, make_router
from server.job_views import live_workers
from server.pages import Page, PageDep, read_page

router = make_router("workers")


class WorkerView(BaseModel):
    """A process that runs attempts, as it last described itself."""

    id: str
    name: str
    host: str
    pid: int
    capabilities: list[str]
    slots: int
    version: str
    started_at: datetime
    seen_at: datetime
    stopped_at: datetime | None
    alive: bool
    """False when it said good-bye or was not seen for a minute."""
    jobs: list[str]
    """Ids of the jobs it runs now."""


class QueueView(BaseModel):
    """What waits for one capability."""

    capability: str
    waiting: int
    running: int
    workers: int
    """Live workers with this capability."""
    slots: int
    """Attempts that they run at a time, together."""


@router.get("/workers", summary="List workers")
def list_workers(services: ServicesDep, page: PageDep) -> Page[WorkerView]:
    """Newest first, stopped ones included."""
    cursors = services.cursors
    with services.database.reading() as session:
        rows, cursor = read_page(session, sa.select(Worker), Worker.id, page, cursors=cursors, listing="workers")
        alive = {worker.id for worker in session.scalars(live_workers(session, services.settings))}
        running = _running_jobs(session, [worker.name for worker in rows])
        return Page(items=[_show(worker, worker.id in alive, running[worker.name]) for worker in rows], next_cursor=cursor)


def _running_jobs(session: Session, names: list[str]) -> dict[str, list[str]]:
    running: dict[str, list[str]] = defaultdict(list)
    query = sa.select(Job.lease_holder, Job.id).where(Job.status == "running", Job.lease_holder.in_(names)).order_by(Job.id)
    for name, job_id in session.execute(query):
        running[name or ""].append(job_id)
    return running


def _show(worker: Worker, alive: bool, jobs: list[str]) -> WorkerView:
    facts = {name: getattr(worker, name) for name in WorkerView.model_fields if name not in ("alive", "jobs")}
    return WorkerView(**facts, alive=alive, jobs=jobs)


@router.get("/queues", summary="What waits, by capability")
def list_queues(services: ServicesDep) -> Page[QueueView]:
    """A queue with jobs and no worker is why nothing happens."""
    with services.database.reading() as session:
        query = sa.select(Job.capability, Job.status, sa.func.count()).where(Job.status.in_(("queued", "running")))
        counts = {(name, status): number for name, status, number in session.execute(query.group_by(Job.capability, Job.status))}
        workers = list(session.scalars(live_workers(session, services.settings)))
    names = {name for name, _ in counts} | {name for worker in workers for name in worker.capabilities}
    return Page(items=[_queue(name, counts, [worker for worker in workers if name in worker.capabilities]) for name in sorted(names)])


def _queue(name: str, counts: dict[tuple[str, str], int], workers: list[Worker]) -> QueueView:
    return QueueView(
        capability=name,
        waiting=counts.get((name, "queued"), 0),
        running=counts.get((name, "running"), 0),
        workers=len(workers),
        slots=sum(worker.slots for worker in workers),
    )
