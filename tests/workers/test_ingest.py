"""One job from its row to its result, through a real worker process."""

from __future__ import annotations

from pathlib import Path

from core.db.datasets import get_version
from core.db.files import list_files
from core.db.session import Database
from core.storage import LocalStorage
from ml.manifest import Manifest
from tests.workers.builders import add_ingest, kinds_of, make_settings, read_events, running_worker, wait_for_end, write_folder


def test_a_folder_becomes_a_version_with_its_manifest(database: Database, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, database)
    job_id = add_ingest(database, write_folder(tmp_path))

    with running_worker(settings, tmp_path) as worker:
        job = wait_for_end(database, job_id)
        status = worker.stop()

    assert job.status == "succeeded", job.error
    assert status == 0
    assert kinds_of(read_events(database, job_id)) == ["queued", "started", "succeeded"]
    with database.reading() as session:
        version = get_version(session, job.input["version_id"])
        [stored] = list_files(session, version.id)
    assert (version.status, version.num_images, version.class_names) == ("ready", 8, ["cat", "dog"])
    assert len(Manifest.read(LocalStorage(settings.objects_directory).fetch(stored.digest))) == 8
    assert not (settings.attempts_directory / job_id).exists()


def test_an_empty_folder_fails_the_job_and_its_version_with_the_reason(database: Database, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job_id = add_ingest(database, tmp_path / "empty")

    with running_worker(make_settings(tmp_path, database), tmp_path) as worker:
        job = wait_for_end(database, job_id)
        worker.stop()

    assert job.error is not None
    assert (job.status, job.error["class"], job.error["code"]) == ("failed", "permanent", "data.no_images")
    assert job.attempt == 1
    with database.reading() as session:
        assert get_version(session, job.input["version_id"]).status == "failed"
