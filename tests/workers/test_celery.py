"""`celery -A workers.app worker` with a real Redis: hints wake, and losing all of them loses nothing."""

from __future__ import annotations

import base64
import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from core.db.session import Database
from core.db.workers import drain_worker
from core.queue import make_celery
from core.settings import Settings
from core.storage import LocalStorage
from tests.builders_services import wait_until
from tests.faults.servers import Redis
from tests.workers.builders import add_ingest, make_settings, read_events, running_worker, wait_for_end, write_folder
from workers.supervisor import Supervisor
from workers.tasks import register

CELERY = ("celery", "-A", "workers.app", "worker", "-Q", "cpu", "--loglevel", "WARNING")
CELERY_DEAF = ("celery", "-A", "tests.workers.deaf_consumer", *CELERY[3:])
CELERY_HASTY = ("celery", "-A", "tests.workers.hasty_consumer", *CELERY[3:])


def open_database(url: str) -> Database:
    return Database(Settings(database_url=url).resolved_database_url)


def test_a_task_wakes_a_slot_and_the_log_says_which_woke_which(postgresql_url: str, redis_url: str, tmp_path: Path) -> None:
    database = open_database(postgresql_url)
    # So seldom a look that only the message can have been the reason.
    settings = make_settings(tmp_path, database, redis_url=redis_url, poll_seconds=600.0)
    folder = write_folder(tmp_path)

    with running_worker(settings, tmp_path, *CELERY) as worker:
        wait_until(lambda: worker.lines("worker.started"), seconds=60, what="the worker's start")
        job_ids = [add_ingest(database, folder, name=f"photos-{number}") for number in range(2)]
        ended = [wait_for_end(database, job_id) for job_id in job_ids]
        status = worker.stop()

    assert [job.status for job in ended] == ["succeeded", "succeeded"]
    woken = {line["job_id"]: line["task_id"] for line in worker.lines("task.woke_job")}
    assert job_ids[0] in woken
    assert len(set(woken.values())) == len(woken)
    assert worker.lines("worker.started")[0]["capabilities"] == ["cpu"]
    assert status == 0
    assert worker.lines("worker.stopped")
    database.close()


def test_a_hint_that_finds_no_idle_slot_is_handed_on_once(sqlite_url: str, redis_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database, redis_url=redis_url)
    # Never started, so none of its slots is idle.
    busy = Supervisor(settings, database, LocalStorage(settings.objects_directory))
    run_job = register(make_celery(redis_url), lambda: busy)
    job_id = add_ingest(database, write_folder(tmp_path))
    broker = redis.Redis.from_url(redis_url)

    run_job.apply(args=[job_id])
    [message] = broker.lrange("cpu", 0, -1)
    _, kwargs, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
    run_job.apply(args=[job_id], kwargs=kwargs)

    assert broker.llen("cpu") == 1
    broker.close()
    database.close()


def test_a_flushed_broker_loses_nothing(postgresql_url: str, redis_url: str, tmp_path: Path) -> None:
    database = open_database(postgresql_url)
    settings = make_settings(tmp_path, database, redis_url=redis_url, poll_seconds=2.0, housekeeping_seconds=0.05)
    folder = write_folder(tmp_path)
    broker = redis.Redis.from_url(redis_url)

    with running_worker(settings, tmp_path, *CELERY) as worker:
        wait_until(lambda: worker.lines("worker.started"), seconds=60, what="the worker's start")
        job_ids = []
        for number in range(4):
            job_ids.append(add_ingest(database, folder, name=f"photos-{number}"))
            broker.flushall()
        ended = [wait_for_end(database, job_id, seconds=60) for job_id in job_ids]

    assert [job.status for job in ended] == ["succeeded"] * 4
    assert [job.attempt for job in ended] == [1] * 4
    broker.close()
    database.close()


@pytest.mark.parametrize(("name", "ends"), [("deaf", True), ("hearing", False)])
def test_a_worker_whose_consumer_has_stopped_ends_so_that_a_fresh_one_is_started(
    postgresql_url: str, redis_url: str, tmp_path: Path, name: str, ends: bool
) -> None:
    database = open_database(postgresql_url)
    patience: dict[str, Any] = {"worker_name": name, "consumer_patience_seconds": 1.5}
    settings = make_settings(tmp_path, database, redis_url=redis_url, poll_seconds=1.0, **patience)
    folder = write_folder(tmp_path)

    with running_worker(settings, tmp_path, *CELERY_DEAF) as worker:
        wait_until(lambda: worker.lines("worker.started"), seconds=60, what="the worker's start")
        # It looks for itself, so nothing is lost; the hint lies in the broker.
        assert wait_for_end(database, add_ingest(database, folder)).status == "succeeded"
        if ends:
            status = worker.process.wait(30)
        else:
            # As long as the deaf one takes, and longer.
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(4)
            status = worker.stop()

    assert status == (1 if ends else 0)
    assert [line["capability"] for line in worker.lines("worker.consumer_stopped")] == (["cpu"] if ends else [])
    assert worker.lines("worker.stopped")
    database.close()


@pytest.mark.long
def test_a_broker_that_is_away_for_ever_so_long_is_waited_for(postgresql_url: str, tmp_path: Path) -> None:
    database, broker = open_database(postgresql_url), Redis(tmp_path)
    # So seldom a look that only the message can have been the reason.
    settings = make_settings(tmp_path, database, redis_url=broker.url, poll_seconds=600.0)
    try:
        with running_worker(settings, tmp_path, *CELERY_HASTY) as worker:
            wait_until(lambda: worker.lines("worker.started"), seconds=60, what="the worker's start")
            broker.stop()
            # Celery's own patience ends after a hundred.
            tries = wait_until(lambda: (found := worker.log_path.read_text().count("Cannot connect to")) > 150 and found, seconds=60)
            broker.start()
            ended = wait_for_end(database, add_ingest(database, write_folder(tmp_path)), seconds=60)
            status = worker.stop()
    finally:
        broker.close()
        database.close()

    assert tries > 150
    assert (ended.status, status) == ("succeeded", 0)
    assert worker.lines("task.woke_job")


def test_a_worker_that_starts_while_the_broker_is_away_looks_for_jobs_by_itself(postgresql_url: str, tmp_path: Path) -> None:
    database, broker = open_database(postgresql_url), Redis(tmp_path)
    settings = make_settings(tmp_path, database, redis_url=broker.url, poll_seconds=0.5)
    broker.stop()
    try:
        with running_worker(settings, tmp_path, *CELERY) as worker:
            ended = wait_for_end(database, add_ingest(database, write_folder(tmp_path)), seconds=60)
            status = worker.stop()
    finally:
        broker.close()
        database.close()

    assert (ended.status, status) == ("succeeded", 0)
    assert not worker.lines("task.woke_job")


def test_draining_celery_workers_leave_new_jobs_to_the_others(postgresql_url: str, redis_url: str, tmp_path: Path) -> None:
    database = open_database(postgresql_url)
    # So seldom a look that only messages can have been the reason.
    settings = make_settings(tmp_path, database, redis_url=redis_url, poll_seconds=600.0)
    folder = write_folder(tmp_path)

    with running_worker(settings, tmp_path, *CELERY, name="a") as first, running_worker(settings, tmp_path, *CELERY, name="b") as second:
        wait_until(lambda: first.lines("worker.started") and second.lines("worker.started"), seconds=60, what="both starts")
        with database.transaction() as session:
            drain_worker(session, first.lines("worker.started")[0]["worker_id"])
        job_ids = [add_ingest(database, folder, name=f"photos-{number}") for number in range(4)]
        for job_id in job_ids:
            wait_for_end(database, job_id, seconds=60)

    started = {event.data["worker"] for job_id in job_ids for event in read_events(database, job_id) if event.kind == "started"}
    assert started == {second.lines("worker.started")[0]["worker"]}
    database.close()


def test_a_worker_that_finds_no_database_ends_instead_of_consuming_hints_for_nobody(redis_url: str, tmp_path: Path) -> None:
    nowhere = Settings(data_directory=tmp_path / "data", database_url="postgresql://postgres@127.0.0.1:9/rows", redis_url=redis_url)

    with running_worker(nowhere, tmp_path, *CELERY) as worker:
        status = worker.process.wait(60)

    assert status == 1
    assert worker.lines("worker.cannot_start")
