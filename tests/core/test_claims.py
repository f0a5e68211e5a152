"""Who gets a job: one claimer, whoever else tries, and only jobs that may run."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.session import Database, now
from core.db.tables import Job
from core.db.workers import list_unpublished, mark_published
from core.settings import Settings
from tests.builders_services import wait_until

CLAIM: dict[str, Any] = {"capabilities": ["cpu"], "lease_seconds": 60}


def add_jobs(database: Database, count: int = 1, **values: Any) -> list[str]:
    with database.transaction() as session:
        wanted = [jobs.NewJob(**{"kind": "ingest", "input": {}, **values}) for _ in range(count)]
        return [job.id for job in jobs.enqueue(session, wanted)]


def claim(database: Database, **values: Any) -> Job | None:
    with database.transaction() as session:
        return jobs.claim(session, **{"holder": "worker", **CLAIM, **values})


def claim_until_empty(database: Database, holder: str) -> list[str]:
    """Claim and finish one job after another; the ids that this claimer got."""
    got = []
    while (job := claim(database, holder=holder)) is not None:
        got.append(job.id)
        with database.transaction() as session:
            assert jobs.succeed(session, job.id, token=job.token, result={"holder": holder}) is not None
    return got


def claim_in_process(url: str, holder: str) -> list[str]:
    database = Database(Settings(database_url=url).resolved_database_url)
    try:
        return claim_until_empty(database, holder)
    finally:
        database.close()


def test_eight_threads_on_sqlite_share_jobs_without_a_double_claim(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    wanted = add_jobs(database, 60)

    with ThreadPoolExecutor(8) as pool:
        got = [job_id for part in pool.map(lambda number: claim_until_empty(database, f"thread-{number}"), range(8)) for job_id in part]

    assert sorted(got) == sorted(wanted)
    database.close()


def test_eight_processes_on_postgresql_share_jobs_without_a_double_claim(postgresql_url: str) -> None:
    database = Database(Settings(database_url=postgresql_url).resolved_database_url)
    wanted = add_jobs(database, 60)

    # One process imports, the others are copies of it: eight imports would take most of a minute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(8, mp_context=context) as pool:
        parts = [pool.submit(claim_in_process, postgresql_url, f"process-{number}") for number in range(8)]
        got = [job_id for part in parts for job_id in part.result()]

    assert sorted(got) == sorted(wanted)
    database.close()


def test_jobs_come_by_priority_and_then_by_age(database: Database) -> None:
    [old] = add_jobs(database)
    [new] = add_jobs(database)
    [urgent] = add_jobs(database, priority=1)

    got = [job.id for _ in range(3) if (job := claim(database)) is not None]

    assert got == [urgent, old, new]


def test_a_job_waits_for_a_worker_that_can_do_it(database: Database) -> None:
    [job_id] = add_jobs(database, capability="cuda")

    assert claim(database) is None
    found = claim(database, capabilities=["cpu", "cuda"])
    assert found is not None
    assert found.id == job_id


def test_a_job_that_pauses_after_a_failure_is_not_claimed(database: Database) -> None:
    [job_id] = add_jobs(database)
    with database.transaction() as session:
        jobs.get_job(session, job_id).not_before = now(session) + timedelta(seconds=60)

    assert claim(database) is None


def test_a_canceled_job_cannot_be_claimed(database: Database) -> None:
    [job_id] = add_jobs(database)
    with database.transaction() as session:
        jobs.request_cancel(session, job_id)

    assert claim(database, job_id=job_id) is None


def test_each_claim_raises_attempt_and_token(database: Database) -> None:
    [job_id] = add_jobs(database)

    seen = []
    for _ in range(3):
        job = claim(database)
        assert job is not None
        seen.append((job.attempt, job.token))
        with database.transaction() as session:
            jobs.interrupt(session, job_id, token=job.token, reason="test")

    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_hint_that_comes_while_the_relay_notes_its_publication_is_not_lost(postgresql_url: str) -> None:
    database = Database(Settings(database_url=postgresql_url).resolved_database_url)
    [job_id] = add_jobs(database)

    with ThreadPoolExecutor(1) as pool:
        with database.transaction() as relay:
            mark_published(relay, [message.id for message in list_unpublished(relay, limit=10)])
            claimed = pool.submit(claim, database, job_id=job_id)
            wait_until(lambda: _waits_for_lock(relay), what="the claim's wait for the relay")
        found = claimed.result(timeout=30)

    assert found is not None
    database.close()


def _waits_for_lock(session: Session) -> bool:
    return bool(session.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")))
