"""What a worker still does for an attempt that is not its own any more harms neither itself nor the attempt that followed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.db import jobs
from core.db.reuse import Labeled
from core.db.session import Database
from core.db.tables import Job
from core.storage import LocalStorage, Storage, make_storage
from ml.manifest import Manifest
from tests.builders_services import S3Server, wait_until
from tests.workers.builders import add_ingest, add_jobs, make_settings, read_job, wait_for_end, worker_inside, write_folder
from tests.workers.test_buckets import add_training, claim, keep, read_checkpoint, write_checkpoint
from workers.checkpoints import CheckpointKeeper, restore_checkpoint
from workers.inputs import Inputs
from workers.reuse import Found, lay_out
from workers.slots import Slot
from workers.supervisor import Supervisor


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.close()


@pytest.fixture
def bucket(s3_server: S3Server, s3_url: str) -> dict[str, Any]:
    """Settings of a host whose files lie in a bucket."""
    return {"storage_url": s3_url, "s3_endpoint_url": s3_server.url}


def make_slot(database: Database, directory: Path, **values: Any) -> Slot:
    """Of a worker that was not started."""
    settings = make_settings(directory, database, **values)
    return Slot(Supervisor(settings, database, make_storage(settings)), 0)


def claim_again(database: Database, job: Job) -> Job:
    """The next attempt, after this one was given up on."""
    with database.transaction() as session:
        jobs.interrupt(session, job.id, token=job.token, reason="test")
    return claim(database, job.id)


def given_up() -> threading.Event:
    abandoned = threading.Event()
    abandoned.set()
    return abandoned


def test_a_log_that_goes_with_its_folder_is_none(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = read_job(database, add_ingest(database, tmp_path))

    # It was there until the successor of the fenced attempt succeeded, a moment ago.
    monkeypatch.setattr(Path, "is_file", lambda _path: True)
    stored = make_slot(database, tmp_path)._store_log(job)

    assert stored == {}


def test_what_a_fenced_attempt_prepares_hears_that_it_was_abandoned(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    job = claim(database, add_training(database))
    claim_again(database, job)
    heard: list[bool] = []

    result = make_slot(database, tmp_path, **bucket)._beside(job, lambda abandoned: heard.append(abandoned.wait(30)), patient=False)

    assert result is None
    wait_until(lambda: heard == [True], what="the thread that was given up on")


def test_a_checkpoint_that_comes_too_late_replaces_nothing(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    storage = make_storage(make_settings(tmp_path, database, **bucket))
    job = claim(database, add_training(database))
    write_checkpoint(tmp_path / "elsewhere", b"step 1")
    keep(database, storage, job, tmp_path / "elsewhere")
    write_checkpoint(tmp_path / "here", b"step 2, of the next attempt")

    restore_checkpoint(database, storage, job, tmp_path / "here", given_up())

    assert read_checkpoint(tmp_path / "here") == {"last.ckpt": b"step 2, of the next attempt"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["checkpoints"]


def test_a_fenced_attempt_that_keeps_a_checkpoint_leaves_that_of_the_next_one(
    database: Database, tmp_path: Path, bucket: dict[str, Any]
) -> None:
    storage = make_storage(make_settings(tmp_path, database, **bucket))
    job = claim(database, add_training(database))
    write_checkpoint(tmp_path, b"step 1")
    later = CheckpointKeeper(database, storage, claim_again(database, job), tmp_path)
    later._aside.mkdir()

    keep(database, storage, job, tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("outgoing")) == [later._aside.name]


def prepare_split(database: Database, directory: Path, bucket: dict[str, Any]) -> tuple[Inputs, Job]:
    """An attempt that needs a stored manifest."""
    settings = make_settings(directory, database, **bucket)
    with worker_inside(settings):
        version_id = wait_for_end(database, add_ingest(database, write_folder(directory))).input["version_id"]
    [job_id] = add_jobs(database, jobs.NewJob(kind="split", input={"source_version_id": version_id, "targets": {}, "seed": 0}))
    return Inputs(database, make_storage(settings), settings, capabilities=("cpu",)), claim(database, job_id)


def test_what_was_brought_for_an_attempt_outlives_those_before_it(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    inputs, first = prepare_split(database, tmp_path, bucket)
    inputs.request(first, threading.Event())
    second = claim_again(database, first)

    manifest = Path(inputs.request(second, threading.Event())["input"]["manifest"])
    inputs.drop_files(first)

    assert len(Manifest.read(manifest)) == 8
    # What a worker that was killed left behind goes with the next attempt.
    assert [path.name for path in inputs.directory(first.id).iterdir()] == ["inputs-2"]


def test_nothing_stays_of_what_was_brought_in_vain(database: Database, tmp_path: Path, bucket: dict[str, Any]) -> None:
    inputs, job = prepare_split(database, tmp_path, bucket)

    inputs.request(job, given_up())

    assert list(inputs.directory(job.id).iterdir()) == []


def test_a_shard_that_is_laid_out_too_late_replaces_nothing(tmp_path: Path) -> None:
    storage: Storage = LocalStorage(tmp_path / "objects")
    (tmp_path / "shard").write_text("labels")
    found = Found([Labeled(job_id="job_before", result={}, digest=storage.put(tmp_path / "shard")["digest"])], {}, is_same=False)

    lay_out(storage, found, tmp_path / "job", 1, given_up())

    assert list((tmp_path / "job").iterdir()) == []
