"""Why queued jobs wait: the same words from a job and from its queue, and no query more for a thousand jobs than for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from core.db import jobs as rows
from core.db.pseudo_labels import HELD_UNTIL
from core.db.runs import move_run
from core.db.session import Database, now
from core.db.tables import Job
from core.db.workers import drain_worker
from tests.server.builders import Api, add_job, add_run, add_worker, api_in_process, start_job


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    with api_in_process(tmp_path, database_url=database_url) as running:
        yield running


def pause_run(database: Database) -> Job:
    run, job = add_run(database)
    with database.transaction() as session:
        move_run(session, run.id, "paused")
    return job


def pause_after_failure(database: Database) -> Job:
    job = add_job(database)
    with database.transaction() as session:
        rows.get_job(session, job.id).not_before = now(session) + timedelta(seconds=100)
    return job


def hold_for_its_set(database: Database) -> Job:
    job = add_job(database)
    with database.transaction() as session:
        rows.get_job(session, job.id).not_before = HELD_UNTIL
    return job


def drain_all(database: Database) -> Job:
    for name in ("a", "b"):
        worker = add_worker(database, name)
        with database.transaction() as session:
            drain_worker(session, worker.id)
    return add_job(database)


def know_too_little(database: Database) -> Job:
    add_worker(database, "old", protocol=1)
    return add_job(database, protocol=2)


def keep_all_busy(database: Database) -> Job:
    add_worker(database, slots=1)
    start_job(database, add_job(database).id)
    return add_job(database)


def be_idle(database: Database) -> Job:
    add_worker(database, slots=1)
    return add_job(database)


@pytest.mark.parametrize(
    ("arrange", "code", "words"),
    [
        (pause_run, "run_not_active", "its run is paused"),
        (pause_after_failure, "pause_after_failure", "more seconds after a failed attempt, until 20"),
        (hold_for_its_set, "set_unwritten", "the other labeling jobs of its set"),
        (add_job, "no_worker", "no worker with capability cpu"),
        (drain_all, "workers_drain", "a worker with capability cpu that takes jobs: all 2 workers drain"),
        (know_too_little, "protocol_too_new", "it is written in protocol 2, they read up to 1"),
        (keep_all_busy, "slots_busy", "a free slot (with capability cpu: 0 of 1)"),
        (be_idle, "starting", "a worker's next look (free slots with capability cpu: 1 of 1)"),
    ],
)
def test_a_job_and_its_queue_give_the_same_reason(api: Api, arrange: Callable[[Database], Job], code: str, words: str) -> None:
    job = arrange(api.database)

    told = api.client.get(f"/api/v1/jobs/{job.id}").json()["waiting_for"]
    [queue] = api.client.get("/api/v1/queues").json()["items"]

    [reason] = queue["reasons"]
    assert words in told
    assert (reason["code"], reason["jobs"]) == (code, queue["waiting"])
    assert words in reason["message"]


def test_a_waiting_job_says_how_many_come_before_it(api: Api) -> None:
    keep_all_busy(api.database)
    last = add_job(api.database)
    urgent = add_job(api.database, priority=5)
    pause_after_failure(api.database)

    told = {job["id"]: job["waiting_for"] for job in api.client.get("/api/v1/jobs?status=queued").json()["items"]}

    assert told[urgent.id].endswith(", and it is the next one")
    assert told[last.id].endswith(", 2 jobs come before it")


def test_reasons_are_counted_apart(api: Api) -> None:
    add_worker(api.database)
    pause_run(api.database)
    for _ in range(2):
        add_job(api.database)

    [queue] = api.client.get("/api/v1/queues").json()["items"]

    assert {reason["code"]: reason["jobs"] for reason in queue["reasons"]} == {"starting": 2, "run_not_active": 1}


@contextmanager
def counting_queries(database: Database) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        # The watch over promotions asks at its own times.
        if "FROM" in statement and "aliases" not in statement:
            statements.append(statement)

    engines = {database._reading, database._writing}
    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", note)
    yield statements
    for engine in engines:
        sa.event.remove(engine, "before_cursor_execute", note)


@pytest.mark.parametrize("path", ["/api/v1/jobs?limit=200", "/api/v1/queues", "/api/v1/workers"])
def test_a_hundred_waiting_jobs_cost_no_more_queries_than_one(api: Api, path: str) -> None:
    keep_all_busy(api.database)
    # The first request of all reads the key of the cursors.
    api.client.get(path)
    with counting_queries(api.database) as few:
        api.client.get(path)
    with api.database.transaction() as session:
        rows.enqueue(session, [rows.NewJob(kind="import", input={}) for _ in range(100)])

    with counting_queries(api.database) as many:
        items = api.client.get(path).json()["items"]

    assert items
    assert len(few) == len(many) > 0
