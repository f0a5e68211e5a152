"""A shard that was labeled before, by the same network under the same runtime, is taken over; everything else is labeled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.db.session import Database
from core.db.tables import Job
from core.settings import Settings
from core.storage import LocalStorage
from tests.builders_services import wait_until
from tests.ml.builders_generations import build_generation, build_manifest
from tests.ml.builders_images import write_class_folders
from tests.workers.builders import make_settings, read_events
from tests.workers.builders_reuse import add_generation, add_pool, digest_of, new_number, shards_of, start_set
from workers.supervisor import Supervisor


def was_labeled(database: Database, job: Job) -> bool:
    """Whether a process looked at the images: it says so as soon as it does."""
    kinds = [event.kind for event in read_events(database, job.id)]
    assert ("stage" in kinds) != ("reused" in kinds)
    return "stage" in kinds


def wait_for_shards(database: Database, set_id: str) -> list[Job]:
    """The set's shards, once all have ended."""
    wait_until(
        lambda: {job.status for job in shards_of(database, set_id)} <= {"succeeded", "failed"}, seconds=120, what=f"labels of {set_id}"
    )
    found = shards_of(database, set_id)
    assert {job.status for job in found} == {"succeeded"}, [job.error for job in found]
    return found


@contextmanager
def labeling(settings: Settings, database: Database) -> Iterator[None]:
    """A worker that nobody keeps house for: shards are labeled, and nothing follows."""
    supervisor = Supervisor(settings, database, LocalStorage(settings.objects_directory))
    supervisor.start()
    try:
        yield
    finally:
        supervisor.ask_to_stop()
        supervisor.stop()


class Bench:
    """A real generation and a real pool of eight images, in storage and rows."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database, self.directory = database, directory
        self.settings = make_settings(directory, database)
        self.storage = LocalStorage(self.settings.objects_directory)
        self.storage.directory.mkdir(parents=True)
        self.folder = build_generation(directory / "generation")
        self.pool = write_class_folders(directory / "pool", {"x": 8})

    def add_generation(self) -> str:
        files = {path.name: self.storage.put(path) for path in self.folder.iterdir()}
        return add_generation(self.database, files, ["blue", "red"])

    def add_pool(self, name: str) -> tuple[str, int]:
        """The pool's folder as it is now, read into a version: (id, number of images)."""
        path = self.directory / f"manifest-{new_number()}.parquet"
        manifest = build_manifest(self.pool, path, kind="unlabeled")
        return add_pool(self.database, self.storage.put(path), len(manifest), name=name), len(manifest)


@dataclass(frozen=True)
class Played:
    """What became of the shards of each set, with one worker and one real network."""

    bench: Bench
    first: list[Job]
    same: list[Job]
    """Of another import of the network, and another name of the pool."""
    damaged: list[Job]
    """After the stored file of the first shard was altered."""
    grown: list[Job]
    """Of a version of the pool with two more images behind."""


@pytest.fixture(scope="module")
def played(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    directory = tmp_path_factory.mktemp("reuse")
    (directory / "rows.sqlite3").write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{directory / 'rows.sqlite3'}")
    bench = Bench(database, directory)
    version, _ = bench.add_pool("pool")
    other_name, _ = bench.add_pool("the-same-under-another-name")
    with labeling(bench.settings, database):
        first = wait_for_shards(database, start_set(database, bench.add_generation(), version))
        same = wait_for_shards(database, start_set(database, bench.add_generation(), other_name))
        altered = bench.storage.fetch(digest_of(database, first[0]))
        altered.chmod(0o644)
        altered.write_bytes(altered.read_bytes()[:-1] + b"?")
        damaged = wait_for_shards(database, start_set(database, bench.add_generation(), version))
        write_class_folders(directory / "pool", {"y": 2})
        larger, num_images = bench.add_pool("pool")
        grown = wait_for_shards(database, start_set(database, bench.add_generation(), larger, num_images=num_images))
    yield Played(bench, first, same, damaged, grown)
    database.close()


def test_what_was_labeled_before_is_taken_over_without_a_process(played: Played) -> None:
    database = played.bench.database

    assert [was_labeled(database, job) for job in (*played.first, *played.same)] == [True, True, False, False]
    assert [digest_of(database, job) for job in played.same] == [digest_of(database, job) for job in played.first]
    assert [(job.result or {})["reused_from"] for job in played.same] == [job.id for job in played.first]
    assert (played.same[0].result or {})["statuses"] == {"ok": 4}


def test_a_shard_whose_file_is_damaged_is_labeled_again_and_mended_for_all(played: Played) -> None:
    database = played.bench.database

    assert [was_labeled(database, job) for job in played.damaged] == [True, False]
    assert [digest_of(database, job) for job in played.damaged] == [digest_of(database, job) for job in played.first]
    played.bench.storage.verify(digest_of(database, played.first[0]))


def test_a_new_version_of_a_pool_takes_over_the_shards_whose_images_are_the_same(played: Played) -> None:
    database = played.bench.database

    assert [(job.result or {})["skipped"] for job in played.grown] == [True, True, False]
    assert [digest_of(database, job) for job in played.grown[:2]] == [digest_of(database, job) for job in played.first]
