"""Events: appended in the transaction of what they tell, numbered without gaps per job and per run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.tables import Event, Job, Json, Run, UtcDateTime

_ROWS_ONLY = {"synchronize_session": False}
"""Otherwise each UPDATE looks through all objects of the session, and enqueueing ten times as many jobs takes a hundred times as long."""


def append_events(session: Session, job: Job, items: Sequence[tuple[str, dict[str, Any]]], *, at: datetime) -> None:
    """Append (kind, data) pairs to the job's stream, and to its run's.

    The counters live in the job and run rows and are raised in one UPDATE each, whose row lock makes the numbers gap-free.
    """
    if not items:
        return
    number = session.execute(
        sa.update(Job).where(Job.id == job.id).values(num_events=Job.num_events + len(items)).returning(Job.num_events),
        execution_options=_ROWS_ONLY,
    ).scalar_one() - len(items)
    run_number: int | None = None
    if job.run_id is not None:
        run_number = session.execute(
            sa.update(Run).where(Run.id == job.run_id).values(num_events=Run.num_events + len(items)).returning(Run.num_events),
            execution_options=_ROWS_ONLY,
        ).scalar_one() - len(items)
    rows = [
        {
            "job_id": job.id,
            "number": number + offset,
            "run_id": job.run_id,
            "run_number": None if run_number is None else run_number + offset,
            "attempt": job.attempt,
            "kind": kind,
            "data": data,
            "at": at,
        }
        for offset, (kind, data) in enumerate(items, start=1)
    ]
    session.execute(sa.insert(Event), rows)


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
    """The `queued` event of jobs that were inserted in this transaction with `num_events` 1: a few statements, however many jobs."""
    rows = _first_events(session, jobs)
    if not rows:
        return
    each = unfolded(session, rows)
    values = {
        "job_id": each["job_id"].as_string(),
        "number": sa.literal(1),
        "run_id": each["run_id"].as_string(),
        "run_number": each["run_number"].as_integer(),
        "attempt": sa.literal(0),
        "kind": sa.literal("queued"),
        "data": each["data"],
        "at": sa.literal(at, UtcDateTime),
    }
    session.execute(sa.insert(Event).from_select(list(values), sa.select(*values.values())))


def _first_events(session: Session, jobs: Sequence[FreshJob]) -> list[dict[str, Any]]:
    """What differs between them; raises the runs' counters."""
    run_numbers: dict[str, int] = {}
    for run_id, number in Counter(job.run_id for job in jobs if job.run_id is not None).items():
        raised = sa.update(Run).where(Run.id == run_id).values(num_events=Run.num_events + number).returning(Run.num_events)
        run_numbers[run_id] = session.execute(raised, execution_options=_ROWS_ONLY).scalar_one() - number
    rows = []
    for job in jobs:
        run_number = None
        if job.run_id is not None:
            run_numbers[job.run_id] = run_number = run_numbers[job.run_id] + 1
        data = {"kind": job.kind, "step": job.step, "part": job.part}
        rows.append({"job_id": job.id, "run_id": job.run_id, "run_number": run_number, "data": data})
    return rows


def unfolded(session: Session, rows: Sequence[dict[str, Any]]) -> Any:
    """Each of these objects, as an expression that a query reads from: many rows in one parameter, on both databases."""
    unfold = sa.func.json_each if session.get_bind().dialect.name == "sqlite" else sa.func.jsonb_array_elements
    return unfold(sa.literal(rows, Json)).table_valued(sa.column("value", Json)).c.value


def list_job_events(session: Session, job_id: str, *, after: int, limit: int) -> list[Event]:
    """The job's events numbered above `after`, in order."""
    return list(session.scalars(sa.select(Event).where(Event.job_id == job_id, Event.number > after).order_by(Event.number).limit(limit)))


def list_run_events(session: Session, run_id: str, *, after: int, limit: int) -> list[Event]:
    """The run's events numbered above `after` in the run's own count, in order."""
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
