"""Draining: a worker finishes what it has, hands its hints on at once, and leaves the rest to others."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from core.db.session import Database
from core.db.tables import Event
from core.db.workers import drain_worker, resume_worker
from core.queue import make_celery
from core.storage import LocalStorage
from tests.builders_services import wait_until
from tests.workers.builders import (
    WorkerProcess,
    add_ingest,
    make_settings,
    read_events,
    read_job,
    running_worker,
    wait_for_end,
    worker_inside,
    write_folder,
)
from workers.supervisor import Supervisor
from workers.tasks import MOST_TURNS, register


def started_by(database: Database, job_id: str) -> list[str]:
    return [event.data["worker"] for event in read_events(database, job_id) if event.kind == "started"]


def hello(worker: WorkerProcess) -> dict[str, Any]:
    line: dict[str, Any] = wait_until(lambda: worker.lines("worker.started"), seconds=60, what="the worker's start")[0]
    return line


def test_of_two_workers_with_one_name_the_draining_one_finishes_its_attempt_and_the_other_goes_on(
    database: Database, tmp_path: Path
) -> None:
    settings, folder = make_settings(tmp_path, database, worker_name="twin"), write_folder(tmp_path)
    first = add_ingest(database, folder, name="first")
    with running_worker(settings, tmp_path, name="one") as one:
        draining = hello(one)
        wait_until(lambda: read_job(database, first).attempt == 1, what="the first attempt")
        with database.transaction() as session:
            drain_worker(session, draining["worker_id"])
        finished = wait_for_end(database, first)
        second = add_ingest(database, folder, name="second")
        with running_worker(settings, tmp_path, name="two") as two:
            taking = hello(two)
            wait_for_end(database, second)
        third = add_ingest(database, folder, name="third")
        with database.transaction() as session:
            resume_worker(session, draining["worker_id"])
        wait_for_end(database, third)

    assert finished.status == "succeeded"
    names = [draining["worker"], taking["worker"]]
    assert [name.startswith("twin:") for name in names] == [True, True]
    assert [started_by(database, job_id) for job_id in (first, second, third)] == [[names[0]], [names[1]], [names[0]]]


def test_a_hint_that_a_draining_worker_receives_goes_back_at_once_and_not_for_ever(sqlite_url: str, redis_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database, redis_url=redis_url)
    supervisor = Supervisor(settings, database, LocalStorage(settings.objects_directory))
    supervisor.start()
    assert supervisor._worker_id is not None
    with database.transaction() as session:
        drain_worker(session, supervisor._worker_id)
    run_job = register(make_celery(redis_url), lambda: supervisor)
    job_id = add_ingest(database, write_folder(tmp_path))
    broker = redis.Redis.from_url(redis_url)

    started, turns, kwargs = time.monotonic(), 0, dict[str, Any]()
    run_job.apply(args=[job_id])
    while (message := broker.rpop("cpu")) is not None:
        _, kwargs, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
        run_job.apply(args=[job_id], kwargs=kwargs)
        turns += 1

    # A busy worker would hold each of them for two seconds.
    assert time.monotonic() - started < 2
    assert (turns, kwargs) == (MOST_TURNS, {"handed_on": MOST_TURNS})
    assert read_job(database, job_id).status == "queued"
    supervisor.stop()
    broker.close()
    database.close()


@pytest.mark.parametrize("hinted_first", ["low", "high"])
def test_a_hint_starts_the_job_of_the_highest_priority_whichever_it_names(sqlite_url: str, tmp_path: Path, hinted_first: str) -> None:
    database = Database(sqlite_url)
    folder = write_folder(tmp_path)
    # So seldom a look that only the hint can have been the reason.
    with worker_inside(make_settings(tmp_path, database, poll_seconds=600.0)) as worker:
        wait_until(lambda: worker.supervisor.num_idle_slots() == 1, what="an idle slot")
        ids = {name: add_ingest(database, folder, name=name) for name in ("low", "high")}
        with database.transaction() as session:
            session.execute(sa.text("UPDATE jobs SET priority = 50 WHERE id = :id"), {"id": ids["high"]})
        assert worker.supervisor.wake(ids[hinted_first])
        wait_for_end(database, ids["low"])

    with database.reading() as session:
        order = session.scalars(sa.select(Event.job_id).where(Event.kind == "started").order_by(Event.at, Event.job_id)).all()
    assert order == [ids["high"], ids["low"]]
    database.close()
