"""Jobs: accept, claim, keep, finish, lose. Each move is one UPDATE whose WHERE says from where it may come.

Every write of a result carries the token of its claim, so a worker that was given up on cannot overwrite its successor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.events import append_events, append_first_events, unfolded
from core.db.session import now
from core.db.tables import Iteration, Job, OutboxMessage, Run, UtcDateTime, Worker
from core.errors import WrongState
from core.ids import absent, new_id
from core.version import PROTOCOL

SLICE = 1000
"""Jobs that one statement inserts. PostgreSQL ends a transaction that says nothing for ten seconds (session.py), and on a busy machine
writing down 30 000 jobs takes longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """What a caller says of a job that it wants."""

    kind: str
    input: dict[str, Any]
    capability: str = "cpu"
    priority: int = 0
    protocol: int = PROTOCOL
    max_attempts: int = 4
    run_id: str | None = None
    iteration: int | None = None
    step: str | None = None
    part: int | None = None
    pseudo_label_set_id: str | None = None
    generation_id: str | None = None
    id: str = field(default_factory=lambda: new_id("job"))


def enqueue(session: Session, wanted: Sequence[NewJob]) -> list[Job]:
    """Insert jobs as queued, each with its first event and its hint, in the caller's transaction."""
    moment = now(session)
    jobs = []
    for one in wanted:
        values = {name: getattr(one, name) for name in NewJob.__dataclass_fields__}
        jobs.append(Job(**values, status="queued", attempt=0, token=0, lost_attempts=0, num_events=1, created_at=moment))
    session.add_all(jobs)
    session.flush()
    append_first_events(session, jobs, at=moment)
    if jobs:
        session.execute(sa.insert(OutboxMessage), [{"job_id": job.id, "queue": job.capability, "created_at": moment} for job in jobs])
    return jobs


def enqueue_many(session: Session, wanted: Sequence[NewJob]) -> None:
    """The same for thousands, without an object for each: a few statements a slice of them."""
    names = tuple(NewJob.__dataclass_fields__)
    for start in range(0, len(wanted), SLICE):
        some, moment = wanted[start : start + SLICE], now(session)
        each = unfolded(session, [{name: getattr(one, name) for name in names} for one in some])
        columns = {name: _read_column(each, name, Job.__table__.columns[name].type) for name in names}
        columns |= {"status": sa.literal("queued"), "num_events": sa.literal(1), "created_at": sa.literal(moment, UtcDateTime)}
        session.execute(sa.insert(Job).from_select(list(columns), sa.select(*columns.values())))
        append_first_events(session, some, at=moment)
        each = unfolded(session, [{"id": one.id, "queue": one.capability} for one in some])
        hints = sa.select(each["id"].as_string(), each["queue"].as_string(), sa.literal(moment, UtcDateTime))
        session.execute(sa.insert(OutboxMessage).from_select(["job_id", "queue", "created_at"], hints))


def _read_column(each: Any, name: str, kind: sa.types.TypeEngine[Any]) -> Any:
    if isinstance(kind, sa.Integer):
        return each[name].as_integer()
    return each[name].as_string() if isinstance(kind, sa.Text) else each[name]


def _hint(session: Session, job: Job, moment: datetime) -> None:
    session.add(OutboxMessage(job_id=job.id, queue=job.capability, created_at=moment))


def get_job(session: Session, job_id: str) -> Job:
    """The job as the database has it now; NotFound when there is none."""
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise absent("job", job_id)
    return job


def can_start(moment: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    """WHERE of the jobs that some worker may take at this moment. Jobs of a paused run wait."""
    return (
        Job.status == "queued",
        sa.or_(Job.not_before.is_(None), Job.not_before <= moment),
        # Not a join: among many finished runs PostgreSQL would expect it to leave hardly a job, and sort the whole queue instead of
        # reading it in order.
        sa.or_(Job.run_id.is_(None), Job.run_id.in_(sa.select(Run.id).where(Run.status == "active"))),
    )


def claim(
    session: Session,
    *,
    holder: str,
    capabilities: Sequence[str],
    lease_seconds: float,
    job_id: str | None = None,
    pseudo_label_set_id: str | None = None,
    max_attempts: int | None = None,
    protocol: int = PROTOCOL,
) -> Job | None:
    """Take a queued job for `holder`; None when there is none to take.

    One UPDATE decides. The broker may hand the same message to two workers, so the row says who works, never the message.
    `job_id` asks for that job only; `pseudo_label_set_id` for further shards of that set only. Jobs of a paused run wait.
    `max_attempts` is the claiming worker's limit, which holds from now on; None keeps the row's. A worker that drains gets nothing,
    and none gets a job whose protocol is above its own.
    """
    moment = now(session)
    takes: dict[str, Any] = {
        "status": "running",
        "attempt": Job.attempt + 1,
        "token": Job.token + 1,
        "lease_holder": holder,
        "lease_until": moment + timedelta(seconds=lease_seconds),
        "started_at": sa.func.coalesce(Job.started_at, moment),
        "progress": sa.null(),
        "max_attempts": Job.max_attempts if max_attempts is None else max_attempts,
    }
    waiting = claimable(moment, holder=holder, protocol=protocol)
    job = None
    if job_id is not None:
        # Who was told of one waits: the relay holds that row for the moment in which it notes that the hint went out, and a
        # hint passed over costs a polling interval. Whoever looks for any job passes over locked ones.
        job = _take(session, waiting.where(Job.id == job_id, Job.capability.in_(capabilities)), takes, skip_locked=False)
    elif pseudo_label_set_id is not None:
        shards = waiting.where(Job.pseudo_label_set_id == pseudo_label_set_id, Job.kind == "label", Job.capability.in_(capabilities))
        job = _take(session, shards, takes, skip_locked=True)
    else:
        for capability in _by_first_job(session, waiting, capabilities):
            job = _take(session, waiting.where(Job.capability == capability), takes, skip_locked=True)
            if job is not None:
                break
    if job is not None:
        append_events(session, job, [("started", {"attempt": job.attempt, "worker": holder, "token": job.token})], at=moment)
    return job


def claimable(moment: datetime, *, holder: str, protocol: int) -> sa.Select[str]:
    """Ids of the jobs that this worker may take at this moment, the next one first; of one capability they are read in that order."""
    drains = sa.exists().where(Worker.name == holder, Worker.draining_at.is_not(None))
    query = sa.select(Job.id).where(*can_start(moment), Job.protocol <= protocol, ~drains)
    return query.order_by(Job.priority.desc(), Job.id).limit(1)


def _by_first_job(session: Session, waiting: sa.Select[str], capabilities: Sequence[str]) -> list[str]:
    """The capabilities whose queue has a job, that with the next job of all first.

    One ordered look each: asked for jobs of several capabilities at once, a database reads and sorts all of their queues.
    """
    if len(capabilities) < 2:
        return list(capabilities)
    facts = (Job.capability, Job.priority, Job.id)
    firsts = [waiting.with_only_columns(*facts).where(Job.capability == name).subquery() for name in sorted(set(capabilities))]
    found = session.execute(sa.union_all(*(sa.select(first) for first in firsts))).all()
    return [capability for capability, _, _ in sorted(found, key=lambda first: (-first[1], first[2]))]


def _take(session: Session, waiting: sa.Select[str], values: dict[str, Any], *, skip_locked: bool) -> Job | None:
    locked = waiting.with_for_update(skip_locked=skip_locked, of=Job)
    query = sa.update(Job).where(Job.id == locked.scalar_subquery(), Job.status == "queued").values(**values).returning(Job)
    return session.scalars(query.execution_options(synchronize_session=False, populate_existing=True)).one_or_none()


def heartbeat(session: Session, job_id: str, *, token: int, lease_seconds: float, progress: dict[str, Any] | None) -> Job | None:
    """Keep the lease and store the latest progress; None when fenced: another attempt has the job, or it is over."""
    values: dict[str, Any] = {"lease_until": now(session) + timedelta(seconds=lease_seconds)}
    if progress is not None:
        values["progress"] = progress
    return _update_held(session, job_id, token, values)


def _update_held(session: Session, job_id: str, token: int, values: dict[str, Any]) -> Job | None:
    """One UPDATE on the running job that this token holds; None when it holds it no more."""
    query = sa.update(Job).where(Job.id == job_id, Job.token == token, Job.status == "running").values(**values).returning(Job)
    return session.scalars(query.execution_options(synchronize_session=False, populate_existing=True)).one_or_none()


def hold(session: Session, job_id: str, *, token: int) -> Job | None:
    """Let nobody end or take the job before this transaction is over; None when fenced."""
    query = sa.select(Job).where(Job.id == job_id, Job.token == token, Job.status == "running").with_for_update(of=Job)
    return session.scalars(query.execution_options(populate_existing=True)).one_or_none()


def report(session: Session, job_id: str, *, token: int, items: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Append what a running attempt says; False when fenced, and then nothing is written."""
    job = _update_held(session, job_id, token, {"lease_holder": Job.lease_holder})
    if job is None:
        return False
    append_events(session, job, items, at=now(session))
    return True


def succeed(session: Session, job_id: str, *, token: int, result: dict[str, Any]) -> Job | None:
    """Finish the job with its result; None when fenced. A cancel that came too late is dropped, and said so in the event."""
    moment = now(session)
    job = _update_held(session, job_id, token, {"status": "succeeded", "result": result, "error": sa.null(), **_released(moment)})
    if job is not None:
        append_events(session, job, [("succeeded", {"cancel_came_too_late": job.cancel_requested_at is not None})], at=moment)
    return job


def _released(finished: datetime | None) -> dict[str, Any]:
    return {"lease_holder": None, "lease_until": None, "finished_at": finished}


def fail(session: Session, job_id: str, *, token: int, error: dict[str, Any], backoff_seconds: float) -> Job | None:
    """End the attempt with an error: queued again when its class allows another try, else failed. None when fenced.

    `error` holds `class` (lifecycle.ERROR_CLASSES), `code`, `message`, optional `step`. The same code at the same step twice ends the
    retries; `resource` allows one retry, with half the micro-batch.
    """
    job = session.get(Job, job_id, populate_existing=True)
    # A worker that was given up on may come back after the job was deleted.
    return None if job is None else _end_attempt(session, job, token, error, backoff_seconds=backoff_seconds)


def step_of(progress: dict[str, Any] | None) -> int | None:
    """The training step that an attempt reported last; None when it counts something else, or said nothing."""
    return progress["done"] if progress is not None and progress.get("unit") == "steps" else None


def has_halved(error: dict[str, Any] | None) -> bool:
    """Whether an earlier attempt of a job with this `error` ran out of memory, so that the next one takes half the micro-batch."""
    return error is not None and (error.get("class") == "resource" or bool(error.get("halved")))


def _end_attempt(session: Session, job: Job, token: int, error: dict[str, Any], *, backoff_seconds: float) -> Job | None:
    job_id, before, lost = job.id, job.error or {}, job.lost_attempts + 1
    same = error.get("step") is not None and (before.get("code"), before.get("step")) == (error["code"], error["step"])
    again = error["class"] == "retryable" and not same and lost < job.max_attempts
    if error["class"] == "resource":
        again = not has_halved(before)
    elif has_halved(before):
        # A worker that died meanwhile does not make memory larger.
        error = {**error, "halved": True}
    if again and (canceled := _cancel_if_wished(session, job_id, token)) is not None:
        return canceled
    moment = now(session)
    values: dict[str, Any] = {"error": error, "lost_attempts": lost, **_released(None if again else moment)}
    if again:
        values |= {"status": "queued", "not_before": moment + timedelta(seconds=backoff_seconds * 2 ** (lost - 1)), "hinted_at": None}
    else:
        values |= {"status": "failed"}
    held = _update_held(session, job_id, token, values)
    if held is None:
        return None
    kind = "retrying" if again else "failed"
    append_events(session, held, [(kind, {"error": error, "lost_attempts": lost})], at=moment)
    if again:
        _hint(session, held, moment)
    return held


def lose_expired(session: Session, *, backoff_seconds: float, limit: int = 100) -> list[Job]:
    """Take jobs back whose lease ran out: queued again, failed after `max_attempts`, or canceled when that was wished."""
    moment = now(session)
    query = sa.select(Job).where(Job.status == "running", Job.lease_until < moment).order_by(Job.id).limit(limit)
    # Whoever holds a row now is writing it: a late heartbeat, or a cancellation, which this must not wait for in turn.
    query = query.with_for_update(skip_locked=True)
    ended = []
    for job in session.scalars(query.execution_options(populate_existing=True)).all():
        message = f"worker {job.lease_holder} stopped answering; its lease ran out"
        error: dict[str, Any] = {"class": "retryable", "code": "attempt.lost", "message": message}
        if (step := step_of(job.progress)) is not None:
            error["step"] = step
        lost = _end_attempt(session, job, job.token, error, backoff_seconds=backoff_seconds)
        if lost is not None:
            ended.append(lost)
    return ended


def interrupt(session: Session, job_id: str, *, token: int, reason: str, pause_seconds: float = 0) -> Job | None:
    """Give a healthy job back to the queue, or end it as canceled when that was wished; costs no attempt. None when fenced."""
    if (canceled := _cancel_if_wished(session, job_id, token)) is not None:
        return canceled
    moment = now(session)
    later = moment + timedelta(seconds=pause_seconds) if pause_seconds else None
    job = _update_held(session, job_id, token, {"status": "queued", "not_before": later, "hinted_at": None, **_released(None)})
    if job is not None:
        append_events(session, job, [("interrupted", {"reason": reason})], at=moment)
        _hint(session, job, moment)
    return job


def release_dead_holder(session: Session, holder: str) -> list[Job]:
    """Give back every job that a worker known to be dead still holds, at no cost: `up` does this for its own predecessor."""
    rows = session.execute(sa.select(Job.id, Job.token).where(Job.status == "running", Job.lease_holder == holder)).all()
    given_back = [interrupt(session, job_id, token=token, reason="worker.died") for job_id, token in rows]
    session.execute(sa.update(Worker).where(Worker.name == holder).values(stopped_at=now(session)))
    return [job for job in given_back if job is not None]


def request_cancel(session: Session, job_id: str) -> Job:
    """Wish the job canceled: at once when it waits, at its next heartbeat when it runs, a no-op when it was asked before.

    WrongState when it already succeeded or failed.
    """
    _lock(session, job_id)
    moment = now(session)
    waiting = (
        sa.update(Job)
        .where(Job.id == job_id, Job.status == "queued")
        .values(status="canceled", cancel_requested_at=moment, finished_at=moment)
    )
    job = session.scalars(waiting.returning(Job).execution_options(synchronize_session=False, populate_existing=True)).one_or_none()
    if job is not None:
        append_events(session, job, [("canceled", {"while": "queued"})], at=moment)
        return job
    running = (
        sa.update(Job)
        .where(Job.id == job_id, Job.status == "running", Job.cancel_requested_at.is_(None))
        .values(cancel_requested_at=moment)
    )
    job = session.scalars(running.returning(Job).execution_options(synchronize_session=False, populate_existing=True)).one_or_none()
    if job is not None:
        append_events(session, job, [("cancel_requested", {})], at=moment)
        return job
    job = get_job(session, job_id)
    if job.status in ("succeeded", "failed"):
        raise WrongState(f"job {job_id} already {job.status}; only a queued or running job can be canceled", status=job.status)
    return job


def _lock(session: Session, job_id: str) -> datetime | None:
    """Hold the row, so that a wish and a return to the queue come one after the other; when the job was wished canceled."""
    return session.scalar(sa.select(Job.cancel_requested_at).where(Job.id == job_id).with_for_update())


def _cancel_if_wished(session: Session, job_id: str, token: int) -> Job | None:
    """Instead of queueing it again: nobody would claim a job of a canceled run, and its wish would be forgotten."""
    return cancel_held(session, job_id, token=token) if _lock(session, job_id) is not None else None


def cancel_held(session: Session, job_id: str, *, token: int) -> Job | None:
    """Finish a running job whose cancel was wished and whose attempt has ended. None when fenced."""
    moment = now(session)
    job = _update_held(session, job_id, token, {"status": "canceled", **_released(moment)})
    if job is not None:
        append_events(session, job, [("canceled", {"while": "running"})], at=moment)
    return job


def retry(session: Session, job_id: str) -> Job:
    """Queue a failed or canceled job again, with fresh attempts; it continues from its last checkpoint. WrongState otherwise."""
    moment = now(session)
    sources = lifecycle.sources_of({k: v for k, v in lifecycle.JOB_MOVES.items() if k in lifecycle.JOB_TERMINAL}, "queued")
    query = sa.update(Job).where(Job.id == job_id, Job.status.in_(sources))
    values = {
        "status": "queued",
        "lost_attempts": 0,
        "error": sa.null(),
        "cancel_requested_at": None,
        "not_before": None,
        "finished_at": None,
    }
    job = session.scalars(
        query.values(**values).returning(Job).execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is None:
        status = get_job(session, job_id).status
        raise WrongState(f"job {job_id} is {status}; only a failed or canceled job can be retried", status=status)
    append_events(session, job, [("queued", {"kind": job.kind, "step": job.step, "part": job.part, "retry": True})], at=moment)
    _hint(session, job, moment)
    return job


def move_waiting(session: Session, job: Job, capability: str, *, reason: str) -> None:
    """Let a queued job, whose row the caller holds, wait for another capability."""
    moment = now(session)
    append_events(session, job, [("moved", {"from": job.capability, "to": capability, "reason": reason})], at=moment)
    job.capability, job.hinted_at = capability, None
    _hint(session, job, moment)


def set_phase(session: Session, job: Job, phase: str) -> None:
    """Tell the iteration in which phase its running job is."""
    query = sa.update(Iteration).where(Iteration.run_id == job.run_id, Iteration.number == job.iteration)
    session.execute(query.where(Iteration.phase.not_in(lifecycle.PHASE_TERMINAL)).values(phase=phase))
