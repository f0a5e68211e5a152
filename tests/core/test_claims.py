"""Who gets a job: one claimer, whoever else tries, and only jobs that may run."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.session import Database, now
from core.db.tables import Event, Job
from core.db.workers import (
    WorkerDescription,
    drain_worker,
    get_worker,
    list_unpublished,
    mark_published,
    register_worker,
    resume_worker,
)
from core.settings import Settings
from core.version import PROTOCOL
from tests.builders_services import wait_until

CLAIM: dict[str, Any] = {"capabilities": ["cpu"], "lease_seconds": 60}


def add_jobs(database: Database, count: int = 1, **values: Any) -> list[str]:
    with database.transaction() as session:
        wanted = [jobs.NewJob(**{"kind": "ingest", "input": {}, **values}) for _ in range(count)]
        return [job.id for job in jobs.enqueue(session, wanted)]


def claim(database: Database, **values: Any) -> Job | None:
    with database.transaction() as session:
        return jobs.claim(session, **{"holder": "worker", **CLAIM, **values})


def add_worker(database: Database, name: str) -> str:
    """A worker as it describes itself; its id."""
    with database.transaction() as session:
        described: dict[str, Any] = {"host": "h", "boot_id": "b", "pid": 7, "capabilities": ("cpu",), "slots": 1, "version": "0"}
        return register_worker(session, WorkerDescription(name=name, **described)).id


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


def share_among_processes(url: str, count: int) -> list[str]:
    """What so many claimers get together."""
    # One process imports, the others are copies of it: as many imports would take most of a minute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        parts = [pool.submit(claim_in_process, url, f"process-{number}") for number in range(count)]
        return [job_id for part in parts for job_id in part.result()]


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

    assert sorted(share_among_processes(postgresql_url, 8)) == sorted(wanted)
    database.close()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("fixture", "claimers"), [("postgresql_url", 16), ("sqlite_url", 8)])
def test_five_thousand_jobs_are_shared_without_a_double_claim(request: pytest.FixtureRequest, fixture: str, claimers: int) -> None:
    url = request.getfixturevalue(fixture)
    database = Database(Settings(database_url=url).resolved_database_url)
    wanted = add_jobs(database, 5000)

    got = share_among_processes(url, claimers)

    assert sorted(got) == sorted(wanted)
    with database.reading() as session:
        facts = (Job.status, Job.token, Job.attempt)
        tokens = session.execute(sa.select(*facts, sa.func.count()).group_by(*facts))
        starts = session.scalar(sa.select(sa.func.count()).select_from(Event).where(Event.kind == "started"))
        assert tokens.all() == [("succeeded", 1, 1, 5000)]
        assert starts == 5000
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


def test_a_draining_worker_is_given_nothing_until_it_is_resumed(database: Database) -> None:
    [job_id] = add_jobs(database, pseudo_label_set_id="pls", kind="label")
    worker_id = add_worker(database, "w:1:2")
    with database.transaction() as session:
        drain_worker(session, worker_id)

    drained = [claim(database, holder="w:1:2", **which) for which in ({}, {"job_id": job_id}, {"pseudo_label_set_id": "pls"})]
    with database.transaction() as session:
        resume_worker(session, worker_id)
    again = claim(database, holder="w:1:2")

    assert drained == [None] * 3
    assert again is not None


def test_two_workers_with_one_name_are_told_apart(database: Database) -> None:
    add_jobs(database, 2)
    first, second = add_worker(database, "gpu:7:1000"), add_worker(database, "gpu:7:2000")
    with database.transaction() as session:
        drain_worker(session, first)

    assert claim(database, holder="gpu:7:1000") is None
    job = claim(database, holder="gpu:7:2000")

    assert job is not None
    with database.transaction() as session:
        assert jobs.release_dead_holder(session, "gpu:7:1000") == []
        assert [get_worker(session, one).stopped_at is None for one in (first, second)] == [False, True]
    assert claim(database, holder="gpu:7:2000") is not None


def test_a_job_of_a_newer_protocol_waits_for_a_worker_that_reads_it(database: Database) -> None:
    [new] = add_jobs(database, protocol=PROTOCOL + 1, priority=9)
    [old] = add_jobs(database)

    first, second = claim(database), claim(database)
    newer = claim(database, protocol=PROTOCOL + 1)

    assert first is not None
    assert (first.id, second) == (old, None)
    assert newer is not None
    assert newer.id == new


@pytest.mark.parametrize("capabilities", [["cpu"], ["cuda", "cpu"]])
def test_a_claim_reads_the_queue_in_the_order_of_its_index(database: Database, capabilities: list[str]) -> None:
    add_jobs(database, 50)
    add_jobs(database, 50, capability="cuda")

    plans = explain_claim(database, capabilities)

    assert len(plans) == len(capabilities)
    assert all("ix_jobs_claim" in plan for plan in plans)
    assert not [plan for plan in plans if "Sort" in plan or "TEMP B-TREE" in plan]


def explain_claim(database: Database, capabilities: list[str]) -> list[str]:
    """How the database finds the job of a claim: the plan of each statement that looks at the queue."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "priority DESC" in statement:
            asked.append((statement, parameters))

    engine = database.engine()
    sa.event.listen(engine, "before_cursor_execute", note)
    assert claim(database, capabilities=capabilities) is not None
    sa.event.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
    plans = []
    with engine.connect() as connection:
        # A hundred rows are read faster in any other way.
        for way in ("seqscan", "bitmapscan") if not database.is_sqlite else ():
            connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
        for statement, parameters in asked:
            plans.append(" ".join(str(row) for row in connection.exec_driver_sql(f"{explain} {statement}", parameters)))
    return plans


@pytest.mark.parametrize(("cuda", "cpu", "first"), [(0, 0, "cpu"), (1, 0, "cuda"), (0, 1, "cpu")])
def test_a_worker_of_two_capabilities_takes_the_next_job_of_both_queues(database: Database, cuda: int, cpu: int, first: str) -> None:
    add_jobs(database, capability="cpu", priority=cpu)
    add_jobs(database, capability="cuda", priority=cuda)

    got = [job.capability for _ in range(2) if (job := claim(database, capabilities=["cuda", "cpu"])) is not None]

    assert got[0] == first
    assert sorted(got) == ["cpu", "cuda"]


def test_a_worker_of_two_capabilities_takes_from_one_queue_while_the_other_is_being_taken(postgresql_url: str) -> None:
    database = Database(Settings(database_url=postgresql_url).resolved_database_url)
    add_jobs(database, capability="cuda", priority=1)
    [waiting] = add_jobs(database, capability="cpu")

    with database.transaction() as other:
        assert jobs.claim(other, holder="other", capabilities=["cuda"], lease_seconds=60) is not None
        found = claim(database, capabilities=["cuda", "cpu"])

    assert found is not None
    assert found.id == waiting
    database.close()


def test_enqueueing_many_jobs_takes_as_many_statements_as_enqueueing_few(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    statements: list[str] = []
    sa.event.listen(database.engine(), "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    counts = []
    for number in (3, 300):
        statements.clear()
        with database.transaction() as session:
            jobs.enqueue(session, [jobs.NewJob(kind="ingest", input={}) for _ in range(number)])
        counts.append(len(statements))

    assert counts[0] == counts[1] <= 6
    database.close()


def test_what_an_older_version_inserts_can_be_claimed(database: Database) -> None:
    with database.transaction() as session:
        columns = "id, kind, status, capability, priority, input, attempt, lost_attempts, max_attempts, token, num_events, created_at"
        values = "'job_old', 'ingest', 'queued', 'cpu', 0, '{}', 0, 0, 4, 0, 0, '2026-01-01 00:00:00.000000+00:00'"
        session.execute(sa.text(f"INSERT INTO jobs ({columns}) VALUES ({values})"))

    job = claim(database)

    assert job is not None
    assert (job.id, job.protocol) == ("job_old", 1)


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
