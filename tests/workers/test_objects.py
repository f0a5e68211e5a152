"""Datasets that lie in S3: what the attempt's process may know for that, and how a store that refuses or is away ends a job."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from core.db.datasets import add_version, create_dataset, get_version, source_of
from core.db.files import list_files
from core.db.jobs import NewJob
from core.db.session import Database
from core.db.tables import Job
from core.settings import Settings
from core.storage import LocalStorage, make_storage
from ml.manifest import Manifest
from tests.builders_services import S3Server, running_s3, wait_until
from tests.ml.builders_images import write_class_folders
from tests.ml.builders_sources import write_tars
from tests.workers.builders import (
    add_ingest,
    add_jobs,
    kinds_of,
    make_settings,
    read_events,
    running_worker,
    wait_for_end,
    wait_for_status,
    worker_inside,
    write_folder,
)
from tests.workers.test_attempts import frozen_child
from workers.child import find_access
from workers.inputs import Inputs


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _knows_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine knows of AWS is not there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def shards(s3_server: S3Server, tmp_path: Path) -> str:
    """Address of the tar shards of `write_folder`'s images."""
    name = f"shards-{uuid4().hex}"
    s3_server.make_bucket(name)
    write_tars(write_folder(tmp_path), s3_server.directory / name / "tars")
    return f"s3://{name}/tars"


def add_reading(database: Database, address: str) -> str:
    with database.transaction() as session:
        dataset = create_dataset(session, name=f"of-{uuid4().hex}", kind="labeled")
        _, job = add_version(session, dataset, source={"path": address, "format": "auto", "split": None})
        assert job is not None
        return job.id


def access_settings(server: S3Server) -> dict[str, Any]:
    return {
        "dataset_s3_endpoint_url": server.url,
        "dataset_s3_access_key_id": server.access_key,
        "dataset_s3_secret_access_key": server.secret_key,
    }


def test_shards_in_a_bucket_become_the_version_of_their_folder(
    database: Database, s3_server: S3Server, shards: str, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, database, **access_settings(s3_server))
    jobs = [add_ingest(database, tmp_path / "images"), add_reading(database, shards)]

    with running_worker(settings, tmp_path):
        ended = [wait_for_end(database, job_id) for job_id in jobs]

    assert [job.status for job in ended] == ["succeeded"] * 2, [job.error for job in ended]
    with database.reading() as session:
        folder, bucket = (get_version(session, job.input["version_id"]) for job in ended)
    assert bucket.report == folder.report
    found = Manifest.read(LocalStorage(settings.objects_directory).fetch(bucket.manifest_digest or ""))
    assert (found.root, len(found)) == (shards, 8)


def test_an_attempt_that_reads_a_bucket_is_given_that_buckets_key_alone(
    database: Database, s3_server: S3Server, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOISY_STUDENT_DATABASE_URL", "postgresql://user:secret@host/rows")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the storage")
    monkeypatch.setenv("AWS_PROFILE", "storage")
    settings = make_settings(tmp_path, database, **access_settings(s3_server))
    environments = {}

    with worker_inside(settings):
        for name, job_id in (("bucket", add_reading(database, shards)), ("folder", add_ingest(database, tmp_path / "images"))):
            pid = frozen_child(database, job_id)
            environments[name] = Path(f"/proc/{pid}/environ").read_bytes()
            os.kill(pid, signal.SIGCONT)
            wait_for_status(database, job_id, "succeeded")

    aws = {line.partition(b"=")[0] for line in environments["bucket"].split(b"\0") if line.startswith(b"AWS_")}
    assert aws == {b"AWS_ACCESS_KEY_ID", b"AWS_SECRET_ACCESS_KEY", b"AWS_ENDPOINT_URL_S3"}
    assert b"of the storage" not in environments["bucket"]
    assert b"NOISY_STUDENT_" not in environments["bucket"] + environments["folder"]
    assert b"AWS_" not in environments["folder"]


def test_without_a_key_of_its_own_an_attempt_is_given_what_botocore_reads_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_LAMBDA_SOMETHING", "AWS_CA_BUNDLE"):
        monkeypatch.setenv(name, "x")

    found = find_access(Settings(s3_endpoint_url="http://store:9000", s3_region="eu"))
    own = find_access(Settings(dataset_s3_access_key_id="id", dataset_s3_secret_access_key="secret"))

    chain = {"AWS_ACCESS_KEY_ID": "x", "AWS_SESSION_TOKEN": "x", "AWS_WEB_IDENTITY_TOKEN_FILE": "x", "AWS_CA_BUNDLE": "x"}
    assert found == chain | {"AWS_ENDPOINT_URL_S3": "http://store:9000", "AWS_DEFAULT_REGION": "eu"}
    assert own == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_CA_BUNDLE": "x"}


def test_a_part_of_a_split_lies_where_the_whole_lies(database: Database, tmp_path: Path) -> None:
    with database.transaction() as session:
        whole, _ = add_version(session, create_dataset(session, name="all", kind="labeled"), source={"path": "s3://b/x"}, ingest=False)
        origin = {"split_of": whole.id, "part": "unlabeled"}
        part, _ = add_version(session, create_dataset(session, name="part", kind="unlabeled"), source=origin, ingest=False)
        assert source_of(session, part.id) == {"path": "s3://b/x"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dataset_s3_access_key_id": "nobody"}, "refuses the credentials (InvalidAccessKeyId"),
        ({"address": "s3://nowhere/pool"}, "there is no bucket 'nowhere'"),
    ],
)
def test_a_store_that_refuses_fails_the_job_at_once_and_says_what_is_wrong(
    database: Database, s3_server: S3Server, shards: str, tmp_path: Path, wrong: dict[str, str], said: str
) -> None:
    named = access_settings(s3_server) | {name: value for name, value in wrong.items() if name != "address"}
    job_id = add_reading(database, wrong.get("address", shards))

    with running_worker(make_settings(tmp_path, database, **named), tmp_path):
        job = wait_for_end(database, job_id)

    assert job.error is not None
    assert (job.status, job.attempt, job.error["class"], job.error["code"]) == ("failed", 1, "permanent", "data.store_refused")
    assert said in job.error["message"]
    with database.reading() as session:
        assert get_version(session, job.input["version_id"]).status == "failed"


def test_a_store_that_is_away_costs_an_attempt_and_no_job(database: Database, tmp_path: Path) -> None:
    with running_s3() as server:
        write_class_folders(server.directory / "own" / "images", {"cat": 3, "dog": 3})
        shutil.copytree(server.directory / "own" / "images", tmp_path / "same")
        server.stop()
        job_id = add_reading(database, "s3://own/images")
        with running_worker(make_settings(tmp_path, database, retry_backoff_seconds=0.5, **access_settings(server)), tmp_path):
            wait_until(lambda: "retrying" in kinds_of(read_events(database, job_id)), seconds=60, what="a retry")
            server.start()
            job = wait_for_end(database, job_id)

    assert job.status == "succeeded", job.error
    errors = [event.data["error"] for event in read_events(database, job_id) if event.kind == "retrying"]
    assert {(error["class"], error["code"]) for error in errors} == {("retryable", "storage.unavailable")}


@pytest.mark.parametrize("kept_in", ["folder", "bucket"])
def test_packed_images_are_stored_named_and_read_by_attempts_after_their_source_is_gone(
    database: Database, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_in: str
) -> None:
    folder = write_folder(tmp_path)
    key = {"dataset_s3_access_key_id": s3_server.access_key, "dataset_s3_secret_access_key": s3_server.secret_key}
    stored = {"storage_url": s3_server.make_bucket(f"stored-{uuid4().hex}"), "s3_endpoint_url": s3_server.url, **key}
    settings = make_settings(tmp_path, database, **(stored if kept_in == "bucket" else {}))
    with database.transaction() as session:
        dataset = create_dataset(session, name="packed", kind="labeled")
        source = {"path": str(folder), "format": "auto", "split": None, "pack": {"shard_bytes": 3000, "resize_shorter_side": None}}
        version, job = add_version(session, dataset, source=source)
        assert job is not None

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    with running_worker(settings, tmp_path):
        ended = wait_for_end(database, job.id)
        assert ended.status == "succeeded", ended.error
        target, _ = add_part(database, version.id)
        wanted = {"source_version_id": version.id, "targets": {"labeled": {"version_id": target, "share": "rest"}}, "seed": 0}
        split = wait_for_end(database, add_jobs(database, NewJob(kind="split", input=wanted))[0])
        shutil.rmtree(folder)
        with database.reading() as session:
            named = {row.name: row.digest for row in list_files(session, version.id)}
            of_part = {row.name for row in list_files(session, target)}
            report = get_version(session, version.id).report or {}
        storage = make_storage(settings)
        manifest = Manifest.read(storage.fetch(named["manifest.parquet"]))
        for digest in named.values():
            storage.verify(digest)

    assert split.status == "succeeded", split.error
    assert len(named) == report["packed"]["num_shards"] + 1 > 3
    assert of_part == set(named)
    assert {f"{digest[:2]}/{digest}" for name, digest in named.items() if name != "manifest.parquet"} == set(manifest.column("container"))
    inputs = Inputs(database, storage, settings, capabilities=("cpu",))
    labeling = Job(kind="label", input={"version_id": target})
    assert bool(inputs.access(labeling)) == (kept_in == "bucket")


def add_part(database: Database, version_id: str) -> tuple[str, str]:
    with database.transaction() as session:
        dataset = create_dataset(session, name="part", kind="labeled")
        version, _ = add_version(session, dataset, source={"split_of": version_id, "part": "labeled"}, ingest=False)
        return version.id, dataset.id
