"""Workers as they describe themselves, the singleton lease, and the outbox."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from core.db.jobs import can_start
from core.db.session import now
from core.db.tables import Job, OutboxMessage, SingletonLease, Worker
from core.errors import WrongState
from core.ids import absent, new_id
from core.version import PROTOCOL


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerDescription:
    """What a worker says of itself at its start."""

    name: str
    host: str
    boot_id: str
    pid: int
    capabilities: tuple[str, ...]
    slots: int
    version: str
    protocol: int = PROTOCOL
    code_digest: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def register_worker(session: Session, description: WorkerDescription) -> Worker:
    """Insert a row for this process."""
    moment = now(session)
    values = {name: getattr(description, name) for name in WorkerDescription.__dataclass_fields__}
    worker = Worker(id=new_id("worker"), **values | {"capabilities": list(description.capabilities)}, started_at=moment, seen_at=moment)
    session.add(worker)
    session.flush()
    return worker


def see_worker(session: Session, worker_id: str, *, stopped: bool = False) -> None:
    """The worker is alive, or says good-bye."""
    moment = now(session)
    values = {"seen_at": moment, "stopped_at": moment} if stopped else {"seen_at": moment}
    session.execute(sa.update(Worker).where(Worker.id == worker_id).values(**values))


def list_workers(session: Session) -> list[Worker]:
    """Newest first."""
    return list(session.scalars(sa.select(Worker).order_by(Worker.id.desc()).limit(1000)))


def offered_capabilities(session: Session, *, seen_within_seconds: float = 60.0) -> set[str]:
    """What the workers that are there now, and take jobs, can do."""
    oldest = now(session) - timedelta(seconds=seen_within_seconds)
    query = sa.select(Worker.capabilities).where(Worker.stopped_at.is_(None), Worker.draining_at.is_(None), Worker.seen_at >= oldest)
    return {name for names in session.scalars(query) for name in names}


def capabilities_lately(session: Session, *, within_seconds: float) -> set[str]:
    """What workers could do that took jobs at some time within the last seconds, gone ones included."""
    oldest = now(session) - timedelta(seconds=within_seconds)
    query = sa.select(Worker.capabilities).where(
        Worker.seen_at >= oldest, sa.or_(Worker.draining_at.is_(None), Worker.draining_at >= oldest)
    )
    return {name for names in session.scalars(query) for name in names}


def get_worker(session: Session, worker_id: str) -> Worker:
    """NotFound when there is none."""
    worker = session.get(Worker, worker_id, populate_existing=True)
    if worker is None:
        raise absent("worker", worker_id)
    return worker


def is_draining(session: Session, worker_id: str) -> bool:
    """Whether the worker was asked to finish what it has and to claim nothing more."""
    return session.scalar(sa.select(Worker.draining_at).where(Worker.id == worker_id)) is not None


def drain_worker(session: Session, worker_id: str) -> Worker:
    """Let the worker finish its attempts and claim nothing more; twice changes nothing. WrongState for one that said good-bye."""
    moment = now(session)
    return _steer(session, worker_id, "drained", sa.func.coalesce(Worker.draining_at, moment))


def resume_worker(session: Session, worker_id: str) -> Worker:
    """Let a draining worker claim again; twice changes nothing. WrongState for one that said good-bye."""
    return _steer(session, worker_id, "resumed", None)


def _steer(session: Session, worker_id: str, done: str, draining_at: Any) -> Worker:
    query = sa.update(Worker).where(Worker.id == worker_id, Worker.stopped_at.is_(None)).values(draining_at=draining_at).returning(Worker)
    worker = session.scalars(query.execution_options(synchronize_session=False, populate_existing=True)).one_or_none()
    if worker is not None:
        return worker
    stopped_at = get_worker(session, worker_id).stopped_at
    raise WrongState(f"worker {worker_id} stopped at {stopped_at} and takes no jobs; only one that is there can be {done}")


def hold_singleton(session: Session, name: str, *, holder: str, seconds: float) -> bool:
    """Take or keep the lease that only one process may have; False while another has it."""
    moment = now(session)
    until = moment + timedelta(seconds=seconds)
    insert = (sqlite if session.get_bind().dialect.name == "sqlite" else postgresql).insert(SingletonLease)
    query = insert.values(name=name, holder=holder, until=until).on_conflict_do_update(
        index_elements=["name"],
        set_={"holder": holder, "until": until},
        where=sa.or_(SingletonLease.holder == holder, SingletonLease.until < moment),
    )
    return session.execute(query.returning(SingletonLease.holder)).scalar_one_or_none() == holder


def renew_singleton(session: Session, name: str, *, holder: str, seconds: float) -> bool:
    """Keep a lease that was this holder's without a gap; False when it ran out or another has it."""
    moment = now(session)
    held = (SingletonLease.name == name, SingletonLease.holder == holder, SingletonLease.until >= moment)
    query = sa.update(SingletonLease).where(*held).values(until=moment + timedelta(seconds=seconds)).returning(SingletonLease.holder)
    return session.scalar(query.execution_options(synchronize_session=False)) is not None


def is_held(session: Session, name: str, *, by_others_than: str | None = None) -> bool:
    """Whether somebody (else) has that lease now."""
    held = sa.select(SingletonLease.name).where(SingletonLease.name == name, SingletonLease.until > now(session))
    if by_others_than is not None:
        held = held.where(SingletonLease.holder != by_others_than)
    return session.scalar(held) is not None


def release_singleton(session: Session, name: str, *, holder: str) -> None:
    """Let the next one have it at once."""
    session.execute(sa.delete(SingletonLease).where(SingletonLease.name == name, SingletonLease.holder == holder))


def list_unpublished(session: Session, *, limit: int) -> list[OutboxMessage]:
    """Hints not yet published, oldest first; locked against other relays on PostgreSQL. Those of a job that pauses wait with it."""
    moment = now(session)
    # A look at each message's own job: asked whether there is none that pauses, PostgreSQL may look through all jobs instead.
    pauses_until = sa.select(Job.not_before).where(Job.id == OutboxMessage.job_id).scalar_subquery()
    due = (OutboxMessage.published_at.is_(None), sa.func.coalesce(pauses_until, moment) <= moment)
    query = sa.select(OutboxMessage).where(*due).order_by(OutboxMessage.id).limit(limit)
    return list(session.scalars(query.with_for_update(skip_locked=True)))


def mark_published(session: Session, ids: list[int]) -> None:
    """The broker has these hints; the jobs remember when."""
    moment = now(session)
    jobs = sa.select(OutboxMessage.job_id).where(OutboxMessage.id.in_(ids))
    session.execute(sa.update(Job).where(Job.id.in_(jobs)).values(hinted_at=moment).execution_options(synchronize_session=False))
    session.execute(sa.update(OutboxMessage).where(OutboxMessage.id.in_(ids)).values(published_at=moment))


def hint_again(session: Session, *, older_than_seconds: float, per_capability: int = 20) -> int:
    """Write new hints for jobs that were hinted long ago and could be claimed: their messages were lost. Returns how many.

    Only the next ones of each capability: a long queue waits for slots, not for messages.
    """
    moment = now(session)
    old = moment - timedelta(seconds=older_than_seconds)
    count = 0
    for capability in _queued_capabilities(session):
        waiting = sa.select(Job.id, Job.hinted_at).where(*can_start(moment), Job.capability == capability)
        first = waiting.order_by(Job.priority.desc(), Job.id).limit(per_capability)
        due = [job_id for job_id, hinted_at in session.execute(first) if hinted_at is not None and hinted_at < old]
        session.add_all(OutboxMessage(job_id=job_id, queue=capability, created_at=moment) for job_id in due)
        session.execute(sa.update(Job).where(Job.id.in_(due)).values(hinted_at=None).execution_options(synchronize_session=False))
        count += len(due)
    return count


def _queued_capabilities(session: Session) -> Iterator[str]:
    """Those that a queued job asks for, one look each into the index of a claim, however long the queues are."""
    found: str | None = ""
    while found is not None:
        found = session.scalar(sa.select(sa.func.min(Job.capability)).where(Job.status == "queued", Job.capability > found))
        if found is not None:
            yield found


def forget_old_messages(session: Session, *, older_than_seconds: float) -> None:
    """Published hints are of no use later."""
    old = now(session) - timedelta(seconds=older_than_seconds)
    session.execute(sa.delete(OutboxMessage).where(OutboxMessage.published_at < old))
