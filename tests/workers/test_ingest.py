"""One job from its row to its result, through a worker and its child process."""

from __future__ import annotations

from pathlib import Path

from core.db.datasets import add_version, create_dataset, get_version
from core.db.files import list_files
from core.db.jobs import NewJob
from core.db.session import Database
from core.storage import LocalStorage
from ml.manifest import Manifest
from tests.ml.builders_sources import write_parquet, write_tars
from tests.workers.builders import (
    add_ingest,
    add_jobs,
    kinds_of,
    make_settings,
    read_events,
    running_worker,
    wait_for_end,
    worker_inside,
    write_folder,
)


def test_a_folder_becomes_a_version_with_its_manifest(database: Database, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, database)
    job_id = add_ingest(database, write_folder(tmp_path))

    with worker_inside(settings):
        job = wait_for_end(database, job_id)

    assert job.status == "succeeded", job.error
    assert kinds_of(read_events(database, job_id)) == ["queued", "started", "succeeded"]
    assert [event.number for event in read_events(database, job_id)] == list(range(1, job.num_events + 1))
    with database.reading() as session:
        version = get_version(session, job.input["version_id"])
        [stored] = list_files(session, version.id)
    assert (version.status, version.num_images, version.class_names) == ("ready", 8, ["cat", "dog"])
    assert len(Manifest.read(LocalStorage(settings.objects_directory).fetch(stored.digest))) == 8
    assert not (settings.attempts_directory / job_id).exists()


def test_shards_become_the_same_version_as_their_folder(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database)
    folder = write_folder(tmp_path)
    tars = write_tars(folder, tmp_path / "tars")
    parquet = write_parquet(folder, tmp_path / "hub")
    with database.transaction() as session:
        jobs = [
            add_version(session, create_dataset(session, name=path.name, kind="labeled"), source={"path": str(path), **more})[1]
            for path, more in ((tars, {}), (parquet, {"format": "parquet", "split": "train"}))
        ]
    job_ids = [add_ingest(database, folder), *(job.id for job in jobs if job is not None)]

    with worker_inside(settings):
        ended = [wait_for_end(database, job_id) for job_id in job_ids]

    assert [job.status for job in ended] == ["succeeded"] * 3
    with database.reading() as session:
        versions = [get_version(session, job.input["version_id"]) for job in ended]
    assert [version.report for version in versions[1:]] == [versions[0].report] * 2
    assert versions[0].report is not None
    assert versions[0].report["statuses"] == {"ok": 8}
    database.close()


def test_an_empty_folder_fails_the_job_and_its_version_with_the_reason(database: Database, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job_id = add_ingest(database, tmp_path / "empty")

    with worker_inside(make_settings(tmp_path, database)):
        job = wait_for_end(database, job_id)

    assert job.error is not None
    assert (job.status, job.error["class"], job.error["code"]) == ("failed", "permanent", "data.no_images")
    assert job.attempt == 1
    with database.reading() as session:
        assert get_version(session, job.input["version_id"]).status == "failed"
        # The traceback is where every host can read it.
        [log] = list_files(session, job_id)
    text = LocalStorage(tmp_path / "data" / "objects").fetch(log.digest).read_text()
    assert log.name == "attempt-1.log"
    assert "NoImages" in text


def test_a_split_fills_every_part_without_overlap(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database)
    source = add_ingest(database, write_folder(tmp_path, images=10))
    shares = {"labeled": 3, "test": 0.2, "unlabeled": "rest"}
    kinds = {"labeled": "labeled", "test": "evaluation", "unlabeled": "unlabeled"}
    targets = {}

    with worker_inside(settings):
        source_id = wait_for_end(database, source).input["version_id"]
        with database.transaction() as session:
            for part, share in shares.items():
                version, _ = add_version(session, create_dataset(session, name=part, kind=kinds[part]), source={}, ingest=False)
                targets[part] = {"version_id": version.id, "share": share}
        split = NewJob(kind="split", input={"source_version_id": source_id, "targets": targets, "seed": 1})
        job = wait_for_end(database, add_jobs(database, split)[0])

    assert job.status == "succeeded", job.error
    storage, keys = LocalStorage(settings.objects_directory), []
    with database.reading() as session:
        for part, count in (("labeled", 6), ("test", 4), ("unlabeled", 10)):
            version = get_version(session, targets[part]["version_id"])
            assert (version.status, version.num_images) == ("ready", count)
            keys += Manifest.read(storage.fetch(version.manifest_digest or "")).column("key")
    assert len(set(keys)) == len(keys) == 20
    database.close()


def test_a_worker_process_is_small_and_ends_in_order(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    job_id = add_ingest(database, write_folder(tmp_path))

    with running_worker(make_settings(tmp_path, database), tmp_path) as worker:
        wait_for_end(database, job_id)
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        code = worker.stop()

    [resident] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    assert resident * 1024 <= 120_000_000
    assert code == 0
    assert worker.lines("worker.stopped")
    database.close()
