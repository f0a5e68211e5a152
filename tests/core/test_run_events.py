"""A run's events get their numbers after they are committed: no worker of a run waits for another, and no reader misses one."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from core.db import events, jobs
from core.db.events import list_run_events, order_events, order_events_of_one
from core.db.runs import hold_run, move_run
from core.db.session import Database
from core.db.tables import Event, Job, Run
from tests.workers.test_controller import add_run, finish_next
from workers.controller import advance_all, advance_run


def add_running(database: Database, run_id: str, count: int) -> list[Job]:
    """Jobs of the run that a worker holds, each with two events."""
    with database.transaction() as session:
        place = {"run_id": run_id, "iteration": 0, "step": "label"}
        jobs.enqueue(session, [jobs.NewJob(kind="label", input={}, part=part, **place) for part in range(count)])
        held = []
        while (job := jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)) is not None:
            held.append(job)
        return held


def report(database: Database, job: Job, *values: int) -> None:
    with database.transaction() as session:
        assert jobs.report(session, job.id, token=job.token, items=[("metric", {"value": value}) for value in values])


def read_numbers(database: Database, run_id: str) -> list[tuple[str, int, int | None]]:
    """(job, number in the job, number in the run) in the run's order."""
    with database.reading() as session:
        return [(event.job_id, event.number, event.run_number) for event in list_run_events(session, run_id, after=0, limit=10_000)]


def test_events_of_a_run_are_numbered_in_the_order_of_each_job_whatever_the_clock_says(database: Database) -> None:
    run_id = add_run(database)
    first, second = add_running(database, run_id, 1)[:2]
    for value in range(3):
        report(database, first, value)
        report(database, second, value, value)
    with database.transaction() as session:
        # The clock was set back before the last report of all.
        last = sa.update(Event).where(Event.job_id == second.id, Event.number >= 7)
        session.execute(last.values(at=datetime(2001, 1, 1, tzinfo=UTC)))

    order_events(database, [run_id])

    numbered = read_numbers(database, run_id)
    assert [number for _, _, number in numbered] == list(range(1, len(numbered) + 1))
    for job in (first, second):
        own = [number for job_id, number, _ in numbered if job_id == job.id]
        assert own == list(range(1, len(own) + 1))
    with database.reading() as session:
        assert session.get_one(Run, run_id).num_events == len(numbered)


def test_what_is_not_committed_yet_gets_a_later_number_and_no_hole_is_left_for_it(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    run_id = add_run(database)
    slow, quick = add_running(database, run_id, 1)[:2]

    with database.transaction() as session:
        assert jobs.report(session, slow.id, token=slow.token, items=[("metric", {"value": "slow"})])
        report(database, quick, 7)
        order_events(database, [run_id])
        before = read_numbers(database, run_id)
    order_events(database, [run_id])

    after = read_numbers(database, run_id)
    assert after[: len(before)] == before
    assert [job_id for job_id, _, _ in after[len(before) :]] == [slow.id]
    assert [number for _, _, number in after] == list(range(1, len(after) + 1))
    database.close()


def test_two_jobs_of_a_run_report_at_one_moment_without_waiting_for_each_other(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    run_id = add_run(database)
    one, other = add_running(database, run_id, 1)[:2]

    with database.transaction() as held, database.transaction() as session:
        session.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
        assert jobs.report(held, one.id, token=one.token, items=[("metric", {})])
        assert jobs.succeed(session, other.id, token=other.token, result={}) is not None
    database.close()


def test_who_moves_a_run_keeps_no_worker_of_it_waiting_and_no_reader_for_long(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    run_id = add_run(database)
    job = add_running(database, run_id, 1)[0]
    order_events(database, [run_id])
    before = read_numbers(database, run_id)

    with database.transaction() as mover:
        hold_run(mover, run_id)
        with database.transaction() as session:
            session.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
            # Its row is written twice, and PostgreSQL then looks whether the run is still there.
            assert jobs.report(session, job.id, token=job.token, items=[("metric", {})])
        order_events(database, [run_id])
        with pytest.raises(sa.exc.OperationalError):
            order_events_of_one(database, run_id, wait_seconds=0.1)
    assert read_numbers(database, run_id) == before
    order_events(database, [run_id])

    assert len(read_numbers(database, run_id)) == len(before) + 1
    database.close()


def test_many_at_once_number_the_same_events_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "ORDERED_AT_ONCE", 4)
    runs = [add_run(database), add_run(database, of=None)]
    held = [job for run_id in runs for job in add_running(database, run_id, 3)]

    def write() -> None:
        for value in range(10):
            for job in held:
                report(database, job, value)

    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=lambda: [order_events(database, runs) for _ in range(20)]) for _ in range(3)]
    for thread in (writer, *readers):
        thread.start()
    for thread in (writer, *readers):
        thread.join()
    order_events(database, runs)

    for run_id in runs:
        numbers = [number for _, _, number in read_numbers(database, run_id)]
        assert numbers == list(range(1, len(numbers) + 1))
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).where(Event.run_number.is_(None))) == 0


def test_what_is_not_numbered_in_time_is_numbered_the_next_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_RUNS_AT_ONCE", 1)
    runs = [add_run(database, of=of) for of in ("", None, None)]
    for run_id in runs:
        report(database, add_running(database, run_id, 1)[0], 1, 2, 3)

    numbered = []
    for _ in runs:
        order_events(database, runs, for_seconds=0)
        numbered.append(sum(len(read_numbers(database, run_id)) > 1 for run_id in runs))

    assert numbered == [1, 2, 3]


def test_a_run_with_more_events_than_a_transaction_takes_is_numbered_to_its_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "ORDERED_AT_ONCE", 2)
    runs = [add_run(database, of=of) for of in ("", None)]
    for run_id in runs:
        report(database, add_running(database, run_id, 1)[0], *range(5))

    order_events(database, runs)

    for run_id in runs:
        with database.reading() as session:
            there = session.scalar(sa.select(sa.func.count()).where(Event.run_id == run_id))
        assert [number for _, _, number in read_numbers(database, run_id)] == list(range(1, (there or 0) + 1))


def test_whoever_begins_a_run_or_moves_it_on_leaves_its_events_numbered(database: Database) -> None:
    unordered = sa.select(Event.kind).where(Event.run_number.is_(None))

    run_id = add_run(database)
    with database.reading() as session:
        assert session.scalars(unordered).all() == []
    assert finish_next(database) == "train-teacher"
    assert advance_run(database, run_id)

    with database.reading() as session:
        assert session.scalars(unordered).all() == []
        assert session.get_one(Run, run_id).num_events == len(read_numbers(database, run_id)) > 4


def test_a_paused_runs_events_are_numbered_by_housekeeping(database: Database) -> None:
    run_id = add_run(database)
    job = add_running(database, run_id, 1)[0]
    with database.transaction() as session:
        move_run(session, run_id, "paused")
    report(database, job, 7)

    advance_all(database)

    assert (job.id, 3) in {(job_id, number) for job_id, number, _ in read_numbers(database, run_id)}


def test_whoever_sees_the_end_of_a_run_finds_every_event_before_it_numbered(database: Database) -> None:
    run_id = add_run(database)
    job = add_running(database, run_id, 1)[0]
    report(database, job, 1, 2, 3)

    with database.transaction() as session:
        move_run(session, run_id, "failed", error={"code": "x", "message": "y"})

    with database.reading() as session:
        unordered = sa.select(sa.func.count()).where(Event.run_id == run_id, Event.run_number.is_(None))
        assert session.scalar(unordered) == 0
        assert session.get_one(Run, run_id).num_events == len(read_numbers(database, run_id))
