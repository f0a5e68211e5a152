"""Tokens fence, leases run out, errors are worth another try or not, and every move leaves a numbered event."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from core.db import jobs
from core.db.events import list_job_events
from core.db.session import Database, now
from core.db.tables import Job
from core.errors import WrongState
from core.settings import Settings
from tests.core.test_claims import add_jobs, claim

LOST = {"class": "retryable", "code": "attempt.lost", "message": "gone"}


def start(database: Database, **values: Any) -> Job:
    """A job that a worker holds."""
    add_jobs(database, **values)
    job = claim(database)
    assert job is not None
    return job


def expire(database: Database, job_id: str) -> None:
    with database.transaction() as session:
        jobs.get_job(session, job_id).lease_until = now(session) - timedelta(seconds=1)


def lose(database: Database) -> list[Job]:
    with database.transaction() as session:
        return jobs.lose_expired(session, backoff_seconds=0)


def fail(database: Database, job: Job, **error: Any) -> Job:
    with database.transaction() as session:
        failed = jobs.fail(session, job.id, token=job.token, error={**LOST, **error}, backoff_seconds=0)
    assert failed is not None
    return failed


def read(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return jobs.get_job(session, job_id)


def test_a_worker_that_was_given_up_on_writes_nothing(database: Database) -> None:
    late = start(database)
    expire(database, late.id)
    lose(database)
    successor = claim(database)
    assert successor is not None
    with database.reading() as session:
        before = list_job_events(session, late.id, after=0, limit=100)

    with database.transaction() as session:
        answers = [
            jobs.heartbeat(session, late.id, token=late.token, lease_seconds=60, progress={"done": 1}),
            jobs.report(session, late.id, token=late.token, items=[("metric", {})]) or None,
            jobs.succeed(session, late.id, token=late.token, result={"mine": True}),
            jobs.fail(session, late.id, token=late.token, error=LOST, backoff_seconds=0),
            jobs.interrupt(session, late.id, token=late.token, reason="late"),
            jobs.cancel_held(session, late.id, token=late.token),
        ]

    assert answers == [None] * 6
    job = read(database, late.id)
    assert (job.status, job.token, job.progress, job.result) == ("running", successor.token, None, None)
    with database.reading() as session:
        assert len(list_job_events(session, late.id, after=0, limit=100)) == len(before)


def test_an_expired_lease_queues_the_job_again_and_counts_the_attempt(database: Database) -> None:
    job = start(database)
    expire(database, job.id)

    [lost] = lose(database)

    assert (lost.status, lost.lost_attempts, lost.lease_holder) == ("queued", 1, None)
    assert lose(database) == []


def test_a_lease_in_time_is_not_lost(database: Database) -> None:
    start(database)

    assert lose(database) == []


def test_a_job_that_loses_every_attempt_fails(database: Database) -> None:
    job_id = start(database, max_attempts=2).id
    expire(database, job_id)
    lose(database)
    assert claim(database) is not None
    expire(database, job_id)

    [lost] = lose(database)

    assert (lost.status, lost.lost_attempts, (lost.error or {})["code"]) == ("failed", 2, "attempt.lost")


def test_an_interruption_costs_no_attempt(database: Database) -> None:
    job = start(database, max_attempts=1)

    with database.transaction() as session:
        back = jobs.interrupt(session, job.id, token=job.token, reason="worker.stopped")

    assert back is not None
    assert (back.status, back.lost_attempts) == ("queued", 0)
    assert claim(database) is not None


@pytest.mark.parametrize(("error", "status"), [({"class": "permanent"}, "failed"), ({"class": "retryable"}, "queued")])
def test_the_class_of_an_error_decides_about_another_try(database: Database, error: dict[str, str], status: str) -> None:
    assert fail(database, start(database), **error).status == status


def test_running_out_of_memory_is_tried_once_more(database: Database) -> None:
    first = fail(database, start(database), **{"class": "resource", "code": "memory.exhausted"})
    again = claim(database)
    assert again is not None

    second = fail(database, again, **{"class": "resource", "code": "memory.exhausted"})

    assert (first.status, second.status) == ("queued", "failed")


def test_half_the_micro_batch_stays_when_a_worker_dies_after_running_out_of_memory(database: Database) -> None:
    exhausted = fail(database, start(database), **{"class": "resource", "code": "memory.exhausted"})
    second = claim(database)
    assert second is not None
    lost = fail(database, second)
    third = claim(database)
    assert third is not None

    last = fail(database, third, **{"class": "resource", "code": "memory.exhausted"})

    assert [jobs.has_halved(job.error) for job in (exhausted, lost)] == [True, True]
    assert (lost.status, last.status) == ("queued", "failed")


def test_the_same_failure_at_the_same_step_twice_ends_the_retries(database: Database) -> None:
    fail(database, start(database, max_attempts=10), step=7)
    again = claim(database)
    assert again is not None

    assert fail(database, again, step=7).status == "failed"


def test_two_attempts_that_are_lost_at_the_same_step_end_the_retries(database: Database) -> None:
    job = start(database, max_attempts=10)
    ends = []
    for done in (3, 7, 7):
        with database.transaction() as session:
            progress = {"stage": "training", "done": done, "total": 9, "unit": "steps"}
            jobs.heartbeat(session, job.id, token=job.token, lease_seconds=60, progress=progress)
        expire(database, job.id)
        [lost] = lose(database)
        ends.append((lost.status, (lost.error or {})["step"]))
        job = claim(database) or job

    assert ends == [("queued", 3), ("queued", 7), ("failed", 7)]


def test_the_limit_of_the_worker_that_claims_holds(database: Database) -> None:
    add_jobs(database)
    job = claim(database, max_attempts=1)
    assert job is not None

    ended = fail(database, job)

    assert (ended.status, ended.max_attempts) == ("failed", 1)


def test_a_failed_job_that_is_retried_starts_counting_anew(database: Database) -> None:
    job = fail(database, start(database), **{"class": "permanent"})

    with database.transaction() as session:
        back = jobs.retry(session, job.id)

    assert (back.status, back.lost_attempts, back.error) == ("queued", 0, None)


def test_a_succeeded_job_can_be_neither_canceled_nor_retried(database: Database) -> None:
    job = start(database)
    with database.transaction() as session:
        jobs.succeed(session, job.id, token=job.token, result={})

    with database.transaction() as session:
        with pytest.raises(WrongState, match="succeeded"):
            jobs.request_cancel(session, job.id)
        with pytest.raises(WrongState, match="succeeded"):
            jobs.retry(session, job.id)


def test_canceling_twice_is_one_wish(database: Database) -> None:
    job = start(database)

    for _ in range(2):
        with database.transaction() as session:
            jobs.request_cancel(session, job.id)

    with database.reading() as session:
        kinds = [event.kind for event in list_job_events(session, job.id, after=0, limit=100)]
    assert kinds == ["queued", "started", "cancel_requested"]


@pytest.mark.parametrize("how", ["lease", "error", "dead worker", "interruption"])
def test_an_attempt_that_is_lost_after_the_wish_ends_canceled(database: Database, how: str) -> None:
    job = start(database)
    with database.transaction() as session:
        jobs.request_cancel(session, job.id)

    if how == "lease":
        expire(database, job.id)
        lose(database)
    elif how == "error":
        fail(database, job)
    else:
        with database.transaction() as session:
            if how == "dead worker":
                assert [one.id for one in jobs.release_dead_holder(session, job.lease_holder or "")] == [job.id]
            else:
                jobs.interrupt(session, job.id, token=job.token, reason="worker.stopped")

    ended = read(database, job.id)
    assert (ended.status, ended.lease_holder, ended.finished_at is not None) == ("canceled", None, True)
    assert claim(database) is None
    with database.reading() as session:
        kinds = [event.kind for event in list_job_events(session, job.id, after=0, limit=100)]
    assert kinds == ["queued", "started", "cancel_requested", "canceled"]


def test_cancel_and_finish_at_one_moment_leave_one_end_and_gapless_events(database: Database) -> None:
    running = [start(database) for _ in range(12)]

    def cancel(job: Job) -> str:
        try:
            with database.transaction() as session:
                jobs.request_cancel(session, job.id)
        except WrongState:
            return "too late"
        with database.transaction() as session:
            return "canceled" if jobs.cancel_held(session, job.id, token=job.token) else "too late"

    def finish(job: Job) -> str:
        with database.transaction() as session:
            return "succeeded" if jobs.succeed(session, job.id, token=job.token, result={}) else "too late"

    with ThreadPoolExecutor(4) as pool:
        ends = [(pool.submit(cancel, job), pool.submit(finish, job)) for job in running]
        answers = [{one.result() for one in pair} for pair in ends]

    for job, answer in zip(running, answers, strict=True):
        [status] = answer - {"too late"}
        assert read(database, job.id).status == status
        with database.reading() as session:
            events = list_job_events(session, job.id, after=0, limit=100)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert sum(event.kind in ("succeeded", "canceled") for event in events) == 1


def test_a_transaction_that_freezes_holds_nobody_for_long(postgresql_url: str) -> None:
    url = Settings(database_url=postgresql_url).resolved_database_url
    frozen, healthy = Database(url, idle_transaction_seconds=0.5), Database(url)
    job = start(healthy)

    def freeze_before_the_next_query() -> None:
        with frozen.transaction() as session:
            assert jobs.heartbeat(session, job.id, token=job.token, lease_seconds=60, progress=None) is not None
            expire(healthy, job.id)  # Waits for the row's lock.
            assert [one.id for one in lose(healthy)] == [job.id]
            jobs.heartbeat(session, job.id, token=job.token, lease_seconds=60, progress=None)

    def freeze_before_the_commit() -> None:
        with frozen.transaction() as session:
            jobs.get_job(session, job.id).priority = 7
            session.flush()
            time.sleep(1)

    for freeze in (freeze_before_the_next_query, freeze_before_the_commit):
        with pytest.raises(sa.exc.OperationalError, match="idle-in-transaction"):
            freeze()
    assert (read(healthy, job.id).status, read(healthy, job.id).priority) == ("queued", 0)
    frozen.close()
    healthy.close()
