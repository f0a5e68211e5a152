"""Thousands of jobs at once: the same rows as one by one, from a transaction that is never silent for long."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.events import order_events
from core.db.session import Database
from core.db.tables import Event, Job, OutboxMessage, Run
from tests.workers.test_controller import add_run

OWN = {"id", "created_at", "job_id", "at", "part", "number", "run_number"}
"""Columns in which two jobs of one kind may differ."""


def make_wanted(run_id: str, part: int) -> jobs.NewJob:
    job_input = {"version_id": "dsv_ä'\"", "start": 16, "labeling": {"threshold": 0.3, "names": [], "model": None, "half": True}}
    where: dict[str, Any] = {"run_id": run_id, "iteration": 1, "step": "label", "part": part, "pseudo_label_set_id": "pls_x"}
    return jobs.NewJob(kind="label", input=job_input, capability="cuda", priority=-3, **where)


def read_rows(session: Session, table: type[Job | Event | OutboxMessage], job_id: str) -> list[dict[str, Any]]:
    column = Job.id if table is Job else table.job_id  # type: ignore[union-attr]
    rows = session.execute(sa.select(*table.__table__.columns).where(column == job_id)).mappings()
    found = [{name: value for name, value in row.items() if name not in OWN} for row in rows]
    return [row | {"data": row["data"] | {"part": "its own"}} if table is Event else row for row in found]


def test_many_jobs_at_once_are_as_one_by_one(database: Database) -> None:
    run_id = add_run(database)
    with database.transaction() as session:
        one = make_wanted(run_id, 0)
        jobs.enqueue(session, [one])
        many = [make_wanted(run_id, part) for part in range(1, 4)]
        jobs.enqueue_many(session, [*many, jobs.NewJob(kind="ingest", input={})])

    with database.reading() as session:
        for table in (Job, Event, OutboxMessage):
            alike = [read_rows(session, table, job.id) for job in (one, *many)]
            assert all(len(rows) == 1 for rows in alike)
            assert all(rows == alike[0] for rows in alike)


def test_events_of_many_jobs_are_numbered_in_their_order(database: Database, monkeypatch: Any) -> None:
    run_id = add_run(database)
    monkeypatch.setattr(jobs, "SLICE", 3)
    wanted = [make_wanted(run_id, part) for part in range(8)]

    with database.transaction() as session:
        jobs.enqueue_many(session, wanted)
    order_events(database, [run_id])

    with database.reading() as session:
        events = session.execute(sa.select(Event.run_number, Event.job_id).where(Event.run_id == run_id).order_by(Event.run_number)).all()
        assert [number for number, _ in events] == list(range(1, 10))
        assert [job_id for _, job_id in events[1:]] == [one.id for one in wanted]
        assert session.get_one(Run, run_id).num_events == 9


def test_ten_times_as_many_jobs_are_enqueued_in_ten_times_as_many_statements(sqlite_url: str, monkeypatch: Any) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database)
    monkeypatch.setattr(jobs, "SLICE", 10)
    statements: list[str] = []
    sa.event.listen(database.engine(), "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    counts = []
    for parts in (range(10), range(10, 110)):
        statements.clear()
        with database.transaction() as session:
            jobs.enqueue_many(session, [make_wanted(run_id, part) for part in parts])
        counts.append(len(statements))

    assert counts[0] < counts[1] <= 10 * counts[0] <= 60
    database.close()
