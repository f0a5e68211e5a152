"""A rolling upgrade: workers that run go on over a schema that only grew; one that starts needs exactly its own."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from core.db.jobs import NewJob
from core.db.session import Database
from core.version import PROTOCOL
from tests.builders_services import wait_until
from tests.workers.builders import add_ingest, add_jobs, make_settings, read_job, running_worker, wait_for_end, worker_inside, write_folder


def expand(database: Database) -> None:
    """What a newer version's migration does before anything of the old shape may go."""
    for table in ("jobs", "workers", "events", "dataset_versions"):
        # Alone: together they could wait for a worker's transaction that waits for them.
        with database.transaction() as session:
            session.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN of_a_newer_version INTEGER DEFAULT 7 NOT NULL"))
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))


def test_a_running_worker_goes_on_over_a_newer_schema_and_a_new_one_of_the_old_version_does_not_start(
    database: Database, tmp_path: Path
) -> None:
    settings, folder = make_settings(tmp_path, database), write_folder(tmp_path)
    with worker_inside(settings):
        before = add_ingest(database, folder, name="before")
        expand(database)
        after = add_ingest(database, folder, name="after")
        ended = [wait_for_end(database, job_id).status for job_id in (before, after)]

        with running_worker(settings, tmp_path) as late:
            status = late.process.wait(30)

    assert ended == ["succeeded", "succeeded"]
    assert status == 2
    assert "the database has schema 9999" in late.log_path.read_text()


def test_an_older_worker_finishes_its_attempt_and_takes_no_job_that_it_cannot_read(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    folder = write_folder(tmp_path)
    with worker_inside(make_settings(tmp_path, database)) as worker:
        old = add_ingest(database, folder, name="old")
        wait_until(lambda: read_job(database, old).attempt == 1, what="the first attempt")
        [new] = add_jobs(database, NewJob(kind="ingest", input={}, protocol=PROTOCOL + 1))
        ended = wait_for_end(database, old)
        wait_until(lambda: worker.supervisor.num_idle_slots() == 1, what="an idle slot")

        assert worker.supervisor.wake(new)
        readable = add_ingest(database, folder, name="readable")
        wait_for_end(database, readable)

    assert ended.status == "succeeded"
    assert (read_job(database, new).status, read_job(database, new).attempt) == ("queued", 0)
    database.close()
