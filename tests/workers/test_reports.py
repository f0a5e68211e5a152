"""What is kept of what an attempt says."""

from __future__ import annotations

from typing import Any

from core.db.jobs import get_job, request_cancel
from core.db.session import Database
from core.db.tables import Event
from tests.core.test_leases import start
from tests.workers.builders import read_events
from workers import outcomes
from workers.progress import Reports


def progress(**data: Any) -> dict[str, Any]:
    return {"type": "event", "kind": "progress", "data": data}


def test_a_look_at_validation_is_a_sign_of_life_but_not_the_jobs_progress() -> None:
    reports = Reports()
    reports.take(progress(done=50, total=100, unit="steps"))
    reports.heard_at = 0.0

    reports.take(progress(stage="evaluating", done=256, total=5000, unit="images"))

    assert reports.heard_at > 0
    assert reports.progress is not None
    assert (reports.progress["done"], reports.progress["unit"]) == (50, "steps")
    assert [data["unit"] for _, data in reports.items] == ["steps"]


def metric(step: int) -> dict[str, Any]:
    return {"type": "event", "kind": "metric", "data": {"step": step}}


def steps_of(events: list[Event]) -> list[int]:
    return [event.data["step"] for event in events if event.kind == "metric"]


def test_what_was_written_by_a_commit_that_was_reported_as_failed_is_not_written_again(database: Database) -> None:
    job, reports = start(database), Reports()

    def write() -> None:
        with database.transaction() as session:
            assert outcomes.write_reports(session, job, reports, lease_seconds=60) is not None

    reports.take(metric(1))
    write()
    reports.written()
    reports.take(metric(2))
    reports.take(metric(3))
    write()
    reports.doubt()
    with database.transaction() as session:
        request_cancel(session, job.id)
    reports.take(metric(4))
    write()
    reports.written()

    assert steps_of(read_events(database, job.id)) == [1, 2, 3, 4]


def test_what_a_failed_commit_did_not_write_is_written_by_the_next(database: Database) -> None:
    job, reports = start(database), Reports()
    reports.take(metric(1))
    reports.doubt()
    reports.take(metric(2))

    with database.transaction() as session:
        get_job(session, job.id)
        outcomes.write_reports(session, job, reports, lease_seconds=60)

    assert steps_of(read_events(database, job.id)) == [1, 2]
