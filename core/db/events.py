"""Events: appended in the transaction of what they tell, numbered without gaps per job and per run.

A job's row counts its events, and whoever appends one holds that row. A run's events are numbered afterwards (`order_events`), once they
are committed, by whoever reads them or keeps house: two hundred workers of one run would otherwise wait for each other's commits.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.session import Database
from core.db.tables import Event, Job, Json, Run, UtcDateTime

ORDERED_AT_ONCE = 5000
"""Events that one transaction numbers."""
_RUNS_AT_ONCE = 50
"""Runs that one transaction looks at: a thousand runs that report must not cost a commit each, nor one transaction hold them all."""
_ROWS_ONLY = {"synchronize_session": False}
"""Otherwise each UPDATE looks through all objects of the session, and enqueueing ten times as many jobs takes a hundred times as long."""


def append_events(session: Session, job: Job, items: Sequence[tuple[str, dict[str, Any]]], *, at: datetime) -> None:
    """Append (kind, data) pairs to the job's stream, and to its run's.

    The job's counter is raised in one UPDATE, whose row lock makes the numbers gap-free.
    """
    if not items:
        return
    number = session.execute(
        sa.update(Job).where(Job.id == job.id).values(num_events=Job.num_events + len(items)).returning(Job.num_events),
        execution_options=_ROWS_ONLY,
    ).scalar_one() - len(items)
    rows = [_row(job, number + offset, item, at) for offset, item in enumerate(items, start=1)]
    session.execute(sa.insert(Event), rows)


CountedJob = sa.Row[str, int, str | None, int]
"""Of a job: id, num_events, run_id, attempt."""


class FreshJob(Protocol):
    """What the first event tells of a job, be it a row or what a caller asks for."""

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def step(self) -> str | None: ...
    @property
    def part(self) -> int | None: ...


def append_first_events(session: Session, jobs: Sequence[FreshJob], *, at: datetime) -> None:
    """The `queued` event of jobs that were inserted in this transaction with `num_events` 1: one statement, however many jobs."""
    if not jobs:
        return
    rows = [{"job_id": job.id, "run_id": job.run_id, "data": {"kind": job.kind, "step": job.step, "part": job.part}} for job in jobs]
    each = unfolded(session, rows)
    values = {
        "job_id": each["job_id"].as_string(),
        "number": sa.literal(1),
        "run_id": each["run_id"].as_string(),
        "attempt": sa.literal(0),
        "kind": sa.literal("queued"),
        "data": each["data"],
        "at": sa.literal(at, UtcDateTime),
    }
    session.execute(sa.insert(Event).from_select(list(values), sa.select(*values.values())))


def _row(job: Job | CountedJob, number: int, item: tuple[str, dict[str, Any]], at: datetime) -> dict[str, Any]:
    kind, data = item
    of_job = {"job_id": job.id, "number": number, "run_id": job.run_id, "run_number": None, "attempt": job.attempt}
    return of_job | {"kind": kind, "data": data, "at": at}


def append_same_event(session: Session, jobs: Sequence[CountedJob], item: tuple[str, dict[str, Any]], *, at: datetime) -> None:
    """One (kind, data) for many jobs, whose `num_events` was just raised by one."""
    rows = [_row(job, job.num_events, item, at) for job in jobs]
    if rows:
        session.execute(sa.insert(Event), rows)


def order_events(database: Database, run_ids: Collection[str], *, for_seconds: float = math.inf) -> None:
    """Number what has happened in these runs since the last time; a run that somebody else holds just now is left to them.

    Only committed events are seen, and one transaction at a time numbers those of a run: no number is left out, and none comes later
    than a higher one that somebody has read. What is not done after `for_seconds` is left to the next time.
    """
    end = time.monotonic() + for_seconds
    waiting = _list_unordered(database, run_ids)
    # Whoever came last the last time may come first this time.
    random.shuffle(waiting)
    left = deque(waiting)
    while left:
        some = [left.popleft() for _ in range(min(_RUNS_AT_ONCE, len(left)))]
        with database.transaction() as session:
            left.extend(_order_some_of(session, some))
        if time.monotonic() >= end:
            return


def _order_some_of(session: Session, run_ids: Collection[str]) -> Iterator[str]:
    """Yields those of the runs that are not finished yet."""
    # Nobody waits here, so who holds one run keeps no other from being told.
    held = sa.select(Run.id).where(Run.id.in_(run_ids)).with_for_update(key_share=True, skip_locked=True)
    room = ORDERED_AT_ONCE
    for run_id in session.scalars(held).all():
        count = _order_some(session, run_id) if room > 0 else ORDERED_AT_ONCE
        room -= count
        if count == ORDERED_AT_ONCE:
            yield run_id


def order_events_of_one(database: Database, run_id: str, *, wait_seconds: float) -> None:
    """The same for one run, and for as long as it takes. On PostgreSQL, OperationalError when another holds the run for `wait_seconds`."""
    while _list_unordered(database, [run_id]):
        with database.transaction() as session:
            if session.get_bind().dialect.name == "postgresql":
                session.execute(sa.text(f"SET LOCAL lock_timeout = {round(1000 * wait_seconds)}"))
            session.scalar(sa.select(Run.id).where(Run.id == run_id).with_for_update(key_share=True))
            _order_some(session, run_id)


def _list_unordered(database: Database, run_ids: Collection[str]) -> list[str]:
    """Those of the runs that have events without a number."""
    if not run_ids:
        return []
    with database.reading() as session:
        unordered = sa.exists().where(Event.run_id == Run.id, Event.run_number.is_(None))
        return list(session.scalars(sa.select(Run.id).where(Run.id.in_(run_ids), unordered)))


def order_events_of(session: Session, run_id: str) -> None:
    """Number all of the run's events in the caller's transaction, which holds the run's row: what comes after it was said before."""
    while _order_some(session, run_id) == ORDERED_AT_ONCE:
        pass


def _order_some(session: Session, run_id: str) -> int:
    """Give the run's oldest events that have no number yet the next ones; the run's row is held. Returns how many there were."""
    # However the clock was set, a job's later event is no older than its earlier ones.
    happened = sa.func.max(Event.at).over(partition_by=Event.job_id, order_by=Event.number)
    unordered = sa.select(Event.job_id, Event.number).where(Event.run_id == run_id, Event.run_number.is_(None))
    oldest = session.execute(unordered.order_by(happened, Event.job_id, Event.number).limit(ORDERED_AT_ONCE)).all()
    if not oldest:
        return 0
    raised = sa.update(Run).where(Run.id == run_id).values(num_events=Run.num_events + len(oldest)).returning(Run.num_events)
    last = session.execute(raised, execution_options=_ROWS_ONLY).scalar_one() - len(oldest)
    # Each row by its own key: a query that finds the unordered ones once more may be planned for far fewer of them than there are.
    places = [{"job_id": job_id, "number": number, "place": place} for place, (job_id, number) in enumerate(oldest, start=last + 1)]
    each = unfolded(session, places)
    by_key = sa.and_(Event.job_id == each["job_id"].as_string(), Event.number == each["number"].as_integer())
    session.execute(sa.update(Event).where(by_key).values(run_number=each["place"].as_integer()), execution_options=_ROWS_ONLY)
    return len(oldest)


def unfolded(session: Session, rows: Sequence[dict[str, Any]]) -> Any:
    """Each of these objects, as an expression that a query reads from: many rows in one parameter, on both databases."""
    unfold = sa.func.json_each if session.get_bind().dialect.name == "sqlite" else sa.func.jsonb_array_elements
    return unfold(sa.literal(rows, Json)).table_valued(sa.column("value", Json)).c.value


def list_job_events(session: Session, job_id: str, *, after: int, limit: int) -> list[Event]:
    """The job's events numbered above `after`, in order."""
    return list(session.scalars(sa.select(Event).where(Event.job_id == job_id, Event.number > after).order_by(Event.number).limit(limit)))


def list_run_events(session: Session, run_id: str, *, after: int, limit: int) -> list[Event]:
    """The run's events numbered above `after` in the run's own count, in order; those that `order_events` has not seen yet come later."""
    query = sa.select(Event).where(Event.run_id == run_id, Event.run_number > after).order_by(Event.run_number).limit(limit)
    return list(session.scalars(query))


def count_reports(session: Session, job_id: str, *, attempt: int) -> int:
    """How many events this running attempt has reported; what others did to the job meanwhile is not counted."""
    of_attempt = (Event.job_id == job_id, Event.attempt == attempt, Event.kind.not_in(("started", "cancel_requested")))
    return session.scalar(sa.select(sa.func.count()).where(*of_attempt)) or 0


def list_metrics(session: Session, job_id: str, *, after: int, limit: int) -> list[Event]:
    """The job's metric points numbered above `after`, in order."""
    query = sa.select(Event).where(Event.job_id == job_id, Event.kind == "metric", Event.number > after)
    return list(session.scalars(query.order_by(Event.number).limit(limit)))
