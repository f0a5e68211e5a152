"""Workers of hosts that share nothing but database and bucket: inputs, results and checkpoints find their way."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core.db import jobs
from core.db.files import list_files, name_files
from core.db.session import Database
from core.db.tables import Job
from core.queue import PollingOnly
from core.storage import Storage, make_storage
from ml.manifest import Manifest
from tests.builders_services import S3Server, running_s3, wait_until
from tests.workers.builders import (
    add_ingest,
    kinds_of,
    make_settings,
    read_events,
    read_job,
    running_worker,
    wait_for_end,
    worker_inside,
    write_folder,
)
from workers import outcomes
from workers.checkpoints import CheckpointKeeper, restore_checkpoint, snapshot
from workers.housekeeping import Housekeeping
from workers.inputs import Inputs


@pytest.fixture
def bucket(s3_server: S3Server, s3_url: str) -> dict[str, Any]:
    """Settings of a host whose files lie in a bucket."""
    return {"storage_url": s3_url, "s3_endpoint_url": s3_server.url}


def claim(database: Database, job_id: str) -> Job:
    with database.transaction() as session:
        job = jobs.claim(session, holder="here", capabilities=["cpu"], lease_seconds=600, job_id=job_id)
    assert job is not None
    return job


def add_training(database: Database) -> str:
    wanted = jobs.NewJob(kind="train", input={})
    with database.transaction() as session:
        jobs.enqueue(session, [wanted])
    return wanted.id


def names_of(database: Database, owner_id: str) -> dict[str, str]:
    with database.reading() as session:
        return {row.name: row.digest for row in list_files(session, owner_id)}


def write_checkpoint(directory: Path, last: bytes, **best: bytes) -> None:
    """As ml writes them: aside, then renamed."""
    folder = directory / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {f"best-{step[1:]}": content for step, content in best.items()}.items() | {("last", last)}:
        (folder / "aside").write_bytes(content)
        (folder / "aside").replace(folder / f"{name}.ckpt")


def read_checkpoint(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "checkpoints").iterdir()}


def keep(database: Database, storage: Storage, job: Job, directory: Path) -> None:
    keeper = CheckpointKeeper(database, storage, job, directory)
    keeper.note()
    keeper.finish()


def test_a_whole_job_on_a_host_whose_files_lie_in_a_bucket(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    settings = make_settings(tmp_path, database, **bucket)
    job_id = add_ingest(database, write_folder(tmp_path))

    with running_worker(settings, tmp_path):
        job = wait_for_end(database, job_id)

    assert job.status == "succeeded", job.error
    elsewhere = make_storage(make_settings(tmp_path / "elsewhere", database, **bucket))
    assert len(Manifest.read(elsewhere.fetch(names_of(database, job.input["version_id"])["manifest.parquet"]))) == 8
    assert not settings.objects_directory.exists()


def test_what_an_attempt_reads_is_linked_into_its_own_folder(sqlite_url: str, tmp_path: Path, bucket: dict[str, Any]) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database, **bucket)
    with worker_inside(settings):
        version_id = wait_for_end(database, add_ingest(database, write_folder(tmp_path))).input["version_id"]
    split = jobs.NewJob(kind="split", input={"source_version_id": version_id, "targets": {}, "seed": 0})
    with database.transaction() as session:
        [job] = jobs.enqueue(session, [split])
    inputs = Inputs(database, make_storage(settings), settings, capabilities=("cpu",))

    path = Path(inputs.request(job, threading.Event())["input"]["manifest"])
    links = path.stat().st_nlink
    inputs.drop_files(job)

    assert path.is_relative_to(inputs.directory(job.id))
    # The other link is the cache's, which removes nothing that has two.
    assert links == 2
    assert not path.exists()
    database.close()


def test_a_bucket_that_is_away_costs_time_and_no_job(sqlite_url: str, tmp_path: Path, s3_credentials: None) -> None:
    database = Database(sqlite_url)
    with running_s3() as server:
        values = {"storage_url": server.make_bucket("bucket"), "s3_endpoint_url": server.url, "max_attempts": 50}
        job_id = add_ingest(database, write_folder(tmp_path))
        server.stop()
        # A lease shorter than the tries to reach the bucket: it is kept meanwhile.
        with worker_inside(make_settings(tmp_path, database, lease_seconds=2.0, **values)):
            wait_until(lambda: "retrying" in kinds_of(read_events(database, job_id)), seconds=60, what="a retry")
            server.start()
            job = wait_for_end(database, job_id, seconds=60)

    errors = [event.data["error"] for event in read_events(database, job_id) if event.kind == "retrying"]
    assert job.status == "succeeded", job.error
    assert {error["code"] for error in errors} == {"storage.unavailable"}
    assert "does not answer" in errors[0]["message"]
    database.close()


def test_another_host_goes_on_from_the_newest_checkpoint(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    here, there = (make_storage(make_settings(tmp_path / name, database, **bucket)) for name in ("here", "there"))
    job = claim(database, add_training(database))
    write_checkpoint(tmp_path / "a", b"step 1", _1=b"best 1")
    keep(database, here, job, tmp_path / "a")
    before = names_of(database, job.id)
    write_checkpoint(tmp_path / "a", b"step 2", _2=b"best 2")
    keep(database, here, job, tmp_path / "a")

    restore_checkpoint(database, there, job, tmp_path / "b", threading.Event())

    assert sorted(before) == ["checkpoint-1/best-1.ckpt", "checkpoint-1/last.ckpt"]
    assert read_checkpoint(tmp_path / "b") == {"last.ckpt": b"step 2", "best-1.ckpt": b"best 1", "best-2.ckpt": b"best 2"}
    # What was replaced does not wait for a sweep, and what is still needed stays.
    stored = set(here.list_old(older_than_seconds=-60, now_seconds=time.time()))
    assert before["checkpoint-1/last.ckpt"] not in stored
    assert stored == set(names_of(database, job.id).values())


def test_a_host_takes_the_checkpoint_of_a_later_attempt_and_keeps_its_own_otherwise(
    sqlite_url: str, tmp_path: Path, bucket: dict[str, Any]
) -> None:
    database = Database(sqlite_url)
    storage = make_storage(make_settings(tmp_path, database, **bucket))
    job = claim(database, add_training(database))
    write_checkpoint(tmp_path / "first", b"step 1")
    (tmp_path / "first" / "attempt-1.log").touch()
    keep(database, storage, job, tmp_path / "first")
    write_checkpoint(tmp_path / "first", b"step 2, not kept")

    restore_checkpoint(database, storage, job, tmp_path / "first", threading.Event())
    own = read_checkpoint(tmp_path / "first")
    with database.transaction() as session:
        jobs.interrupt(session, job.id, token=job.token, reason="test")
    later = claim(database, job.id)
    write_checkpoint(tmp_path / "second", b"step 3")
    keep(database, storage, later, tmp_path / "second")
    restore_checkpoint(database, storage, job, tmp_path / "first", threading.Event())

    assert own["last.ckpt"] == b"step 2, not kept"
    assert read_checkpoint(tmp_path / "first") == {"last.ckpt": b"step 3"}
    database.close()


def test_an_attempt_that_was_given_up_on_keeps_no_checkpoint(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    storage = make_storage(make_settings(tmp_path, database, **bucket))
    job = claim(database, add_training(database))
    with database.transaction() as session:
        jobs.interrupt(session, job.id, token=job.token, reason="test")
    write_checkpoint(tmp_path / "a", b"step 1")

    keep(database, storage, job, tmp_path / "a")

    assert names_of(database, job.id) == {}


def test_a_checkpoint_is_linked_whole_while_the_next_one_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, b"step 1", _1=b"best 1")

    linked = snapshot(tmp_path / "checkpoints", tmp_path / "outgoing")
    write_checkpoint(tmp_path, b"step 2")
    (tmp_path / "checkpoints" / "best-1.ckpt").unlink()

    assert {path.name: path.read_bytes() for path in linked} == {"last.ckpt": b"step 1", "best-1.ckpt": b"best 1"}


def test_a_job_that_succeeded_needs_no_checkpoint(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    job_id = add_ingest(database, write_folder(tmp_path))
    job = claim(database, job_id)
    stored = {"digest": "0" * 64, "num_bytes": 1}
    with database.transaction() as session:
        name_files(session, job_id, {"checkpoint-1/last.ckpt": stored})
    made = {"manifest": {"num_images": 1, "num_usable": 1, "class_names": ["a"]}, "report": {}}

    with database.transaction() as session:
        outcomes.record_success(session, job, made, {"manifest.parquet": stored}, {"attempt-1.log": stored})

    assert read_job(database, job_id).status == "succeeded"
    assert list(names_of(database, job_id)) == ["attempt-1.log"]
    database.close()


def test_checkpoints_of_jobs_that_ended_long_ago_are_forgotten(database: Database, tmp_path: Path) -> None:
    stored = {"checkpoint-1/last.ckpt": {"digest": "0" * 64, "num_bytes": 1}, "attempt-1.log": {"digest": "1" * 64, "num_bytes": 1}}
    ended = {name: add_training(database) for name in ("long ago", "lately")}
    for job_id in ended.values():
        with database.transaction() as session:
            jobs.request_cancel(session, job_id)
            name_files(session, job_id, stored)
    with database.transaction() as session:
        old = jobs.get_job(session, ended["long ago"])
        assert old.finished_at is not None
        old.finished_at = old.finished_at - timedelta(days=7, seconds=60)

    settings = make_settings(tmp_path, database)
    Housekeeping(settings, database, make_storage(settings), PollingOnly(), holder="test").sweep()

    assert list(names_of(database, ended["long ago"])) == ["attempt-1.log"]
    assert len(names_of(database, ended["lately"])) == 2
