"""A retry beside whoever gives up, cancels or deletes the same thing at that moment: one of the two orders, never a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.cancellation import hold_open_jobs, request_cancel_all
from core.db.datasets import add_version, get_dataset
from core.db.deletion import delete_version
from core.db.pseudo_labels import get_set, hold_set
from core.db.runs import get_run, hold_run, move_run
from core.db.session import Database
from core.db.tables import Job
from core.errors import WrongState
from server.jobs import _retry
from tests.builders_services import wait_until
from tests.workers.builders_reuse import add_generation, add_pool, start_set
from tests.workers.test_controller import add_run, fail_next

FILE = {"digest": "0" * 64, "num_bytes": 1}


@pytest.fixture
def database(postgresql_url: str) -> Iterator[Database]:
    """On SQLite one writes at a time, so there is no beside."""
    opened = Database(postgresql_url)
    yield opened
    opened.close()


Doing = Callable[[Session], object]


def beside(database: Database, holding: Doing, doing: Doing, then: Doing) -> Future[object]:
    """Hold something, let another transaction do what it does until it ends or waits, and only then finish."""

    def do() -> object:
        with database.transaction() as session:
            return doing(session)

    def is_waiting() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        with database.reading() as session:
            return bool(session.scalar(sa.text(waiting)))

    with ThreadPoolExecutor(1) as other, database.transaction() as session:
        holding(session)
        future: Future[object] = other.submit(do)
        wait_until(lambda: future.done() or is_waiting(), what="the other transaction")
        then(session)
    return future


def status_of(database: Database, job_id: str) -> str:
    with database.reading() as session:
        return jobs.get_job(session, job_id).status


def test_a_run_that_is_given_up_while_its_job_is_retried_goes_on(database: Database) -> None:
    run_id = add_run(database)
    job_id = fail_next(database)

    retried = beside(
        database,
        lambda session: hold_run(session, run_id),
        lambda session: _retry(session, job_id),
        lambda session: move_run(session, run_id, "failed", error={"code": "x", "message": "y"}),
    )

    assert retried.exception() is None
    with database.reading() as session:
        assert get_run(session, run_id).status == "active"
    assert status_of(database, job_id) == "queued"


def test_a_set_that_is_given_up_while_its_job_is_retried_goes_on(database: Database) -> None:
    teacher, pool = add_generation(database, {"model.safetensors": FILE}, ["cat", "dog"]), add_pool(database, FILE, 4, name="pool")
    set_id = start_set(database, teacher, pool, num_images=4)
    job_id = fail_next(database)

    def give_up(session: Session) -> None:
        get_set(session, set_id).status = "failed"

    retried = beside(database, lambda session: hold_set(session, set_id), lambda session: _retry(session, job_id), give_up)

    assert retried.exception() is None
    with database.reading() as session:
        assert get_set(session, set_id).status == "labeling"


def test_a_run_that_is_canceled_while_its_job_is_retried_has_no_job_left(database: Database) -> None:
    run_id = add_run(database)
    job_id = fail_next(database)

    def hold(session: Session) -> None:
        hold_open_jobs(session, Job.run_id == run_id)
        hold_run(session, run_id)

    def cancel(session: Session) -> None:
        request_cancel_all(session, Job.run_id == run_id)
        move_run(session, run_id, "canceled")

    retried = beside(database, hold, lambda session: _retry(session, job_id), cancel)

    assert isinstance(retried.exception(), WrongState)
    assert status_of(database, job_id) == "failed"


def test_a_number_whose_version_is_deleted_while_the_next_is_added_is_not_given_again(database: Database) -> None:
    add_pool(database, FILE, 4, name="pool")
    with database.transaction() as session:
        newest, _ = add_version(session, get_dataset(session, "pool"), source={"folder": "/data"}, ingest=False)
        newest.status = "failed"

    with database.transaction() as session:
        dataset = get_dataset(session, "pool")
        with database.transaction() as other:
            delete_version(other, newest.id)
        following, _ = add_version(session, dataset, source={"folder": "/data"}, ingest=False)

    assert following.number == newest.number + 1
