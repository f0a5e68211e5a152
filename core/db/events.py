"""Events: appended in the transaction of what they tell, numbered without gaps per job and per run.

A job's row counts its events, and whoever appends one holds that row. A run's events are numbered afterwards (`order_events`), once they
are committed, by whoever reads them or keeps house: two hundred workers of one run would otherwise wait for each other's commits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.session import Database
from core.db.tables import Event, Job, Json, Run, UtcDateTime

ORDERED_AT_ONCE = 5000
"""Events that one transaction numbers."""
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


def order_events(database: Database, run_ids: Collection[str]) -> None:
    """Number what has happened in these runs since the last time.

    Only committed events are seen, and one transaction at a time numbers those of a run: no number is left out, and none comes later
    than a higher one that somebody has read.
    """
    with database.reading() as session:
        unordered = sa.exists().where(Event.run_id == Run.id, Event.run_number.is_(None))
        waiting = list(session.scalars(sa.select(Run.id).where(Run.id.in_(run_ids), unordered)))
    while waiting:
        with database.transaction() as session:
            # Always in the same order, and of a run nothing but its row: two of these never wait for each other.
            session.execute(sa.select(Run.id).where(Run.id.in_(waiting)).order_by(Run.id).with_for_update(key_share=True))
            if _order_some(session, waiting) < ORDERED_AT_ONCE:
                return


def order_events_of(session: Session, run_id: str) -> None:
    """Number all of the run's events in the caller's transaction, which holds the run's row: what comes after it was said before."""
    while _order_some(session, [run_id]) == ORDERED_AT_ONCE:
        pass


def _order_some(session: Session, run_ids: Collection[str]) -> int:
    """Give the oldest events that have no number yet the next ones of their runs, whose rows are held; how many there were."""
    unordered = (Event.run_id.in_(run_ids), Event.run_number.is_(None))
    # However the clock was set, a job's later event is no older than its earlier ones.
    happened = sa.func.max(Event.at).over(partition_by=Event.job_id, order_by=Event.number).label("happened")
    waiting = sa.select(Event.job_id, Event.number, Event.run_id, happened).where(*unordered).subquery()
    order = (waiting.c.happened, waiting.c.job_id, waiting.c.number)
    oldest = sa.select(waiting).order_by(*order).limit(ORDERED_AT_ONCE).subquery()
    place = sa.func.row_number().over(partition_by=oldest.c.run_id, order_by=(oldest.c.happened, oldest.c.job_id, oldest.c.number))
    places = sa.select(oldest.c.job_id, oldest.c.number, oldest.c.run_id, place.label("place")).subquery()
    # The unordered ones are said twice: so the rows to write are looked for among them, not among all events.
    numbered = (
        sa.update(Event)
        .where(*unordered, Event.job_id == places.c.job_id, Event.number == places.c.number, Run.id == places.c.run_id)
        .values(run_number=Run.num_events + places.c.place)
        .returning(Event.run_id)
    )
    counts = Counter(session.scalars(numbered, execution_options=_ROWS_ONLY))
    for run_id, number in counts.items():
        session.execute(sa.update(Run).where(Run.id == run_id).values(num_events=Run.num_events + number), execution_options=_ROWS_ONLY)
    return counts.total()


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
