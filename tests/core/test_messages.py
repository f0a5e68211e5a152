"""The singleton lease, and hints that wait in the outbox until the broker has them."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from core.db import jobs, workers
from core.db.runs import move_run
from core.db.session import Database, now
from core.db.tables import Job, SingletonLease
from tests.core.test_claims import add_jobs
from tests.workers.test_controller import add_run


def hold(database: Database, holder: str) -> bool:
    with database.transaction() as session:
        return workers.hold_singleton(session, "housekeeping", holder=holder, seconds=60)


def unpublished(database: Database) -> list[str]:
    with database.reading() as session:
        return [message.job_id for message in workers.list_unpublished(session, limit=100)]


def publish_all(database: Database) -> None:
    with database.transaction() as session:
        workers.mark_published(session, [message.id for message in workers.list_unpublished(session, limit=100)])


def test_one_holder_has_the_singleton_and_keeps_it(database: Database) -> None:
    assert [hold(database, "a"), hold(database, "b"), hold(database, "a")] == [True, False, True]


def test_a_singleton_whose_time_is_over_can_be_taken(database: Database) -> None:
    hold(database, "a")
    with database.transaction() as session:
        session.get_one(SingletonLease, "housekeeping").until = now(session) - timedelta(seconds=1)

    assert hold(database, "b")


def test_a_released_singleton_is_free_at_once(database: Database) -> None:
    hold(database, "a")
    with database.transaction() as session:
        workers.release_singleton(session, "housekeeping", holder="b")
    assert not hold(database, "b")

    with database.transaction() as session:
        workers.release_singleton(session, "housekeeping", holder="a")

    assert hold(database, "b")


def test_a_job_comes_with_its_hint_and_goes_without_it_when_nothing_is_committed(database: Database) -> None:
    [job_id] = add_jobs(database)
    try:
        with database.transaction() as session:
            jobs.enqueue(session, [jobs.NewJob(kind="ingest", input={})])
            raise InterruptedError
    except InterruptedError:
        pass

    assert unpublished(database) == [job_id]


def test_a_published_hint_is_not_published_again_until_it_is_old(database: Database) -> None:
    [job_id] = add_jobs(database)
    publish_all(database)
    assert unpublished(database) == []

    with database.transaction() as session:
        assert workers.hint_again(session, older_than_seconds=60) == 0
        jobs.get_job(session, job_id).hinted_at = now(session) - timedelta(seconds=61)
    with database.transaction() as session:
        assert workers.hint_again(session, older_than_seconds=60) == 1

    assert unpublished(database) == [job_id]


def test_only_the_next_jobs_that_could_be_claimed_are_hinted_again(database: Database) -> None:
    for capability in ("cpu", "cuda"):
        add_jobs(database, 5, capability=capability)
    run_id = add_run(database)
    publish_all(database)
    with database.transaction() as session:
        of_run = session.scalars(sa.select(Job).where(Job.run_id == run_id)).one()
        session.execute(sa.update(Job).values(hinted_at=now(session) - timedelta(seconds=61)))
        session.execute(sa.update(Job).where(Job.id == of_run.id).values(priority=9))
        move_run(session, run_id, "paused")

    with database.transaction() as session:
        assert workers.hint_again(session, older_than_seconds=60, per_capability=2) == 4

    assert of_run.id not in unpublished(database)
    with database.transaction() as session:
        move_run(session, run_id, "active")
        assert workers.hint_again(session, older_than_seconds=60, per_capability=2) == 1
    assert of_run.id in unpublished(database)


def test_the_hint_of_a_job_that_pauses_waits_with_it(database: Database) -> None:
    [job_id] = add_jobs(database)
    with database.transaction() as session:
        jobs.get_job(session, job_id).not_before = now(session) + timedelta(seconds=60)
    assert unpublished(database) == []

    with database.transaction() as session:
        jobs.get_job(session, job_id).not_before = now(session) - timedelta(seconds=1)

    assert unpublished(database) == [job_id]
