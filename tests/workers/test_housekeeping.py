"""What happens once for all workers: relay, sweep, taking back."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from core.db import jobs
from core.db.files import name_files
from core.db.session import Database, now
from core.db.tables import OutboxMessage, SingletonLease
from core.db.workers import hold_singleton
from core.queue import CeleryQueue, PollingOnly, Queue
from core.storage import LocalStorage
from tests.builders_services import free_port, wait_until
from tests.workers.builders import add_jobs, make_settings, read_job
from workers.folders import alone_in
from workers.housekeeping import Housekeeping

INGEST = jobs.NewJob(kind="ingest", input={})


def keep(database: Database, directory: Path, *, queue: Queue | None = None, holder: str = "a", **values: Any) -> Housekeeping:
    settings = make_settings(directory, database, **values)
    return Housekeeping(settings, database, LocalStorage(settings.objects_directory), queue or PollingOnly(), holder=holder)


def unpublished(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).where(OutboxMessage.published_at.is_(None))) or 0


class Loud:
    """A queue that remembers who asked."""

    def __init__(self, name: str, heard: list[str]) -> None:
        self.name, self.heard = name, heard

    def publish(self, job_id: str, *, capability: str) -> None:
        self.heard.append(self.name)


def test_two_workers_keep_one_house_and_the_second_takes_over_when_the_first_ends(database: Database, tmp_path: Path) -> None:
    heard: list[str] = []
    houses = [keep(database, tmp_path, queue=Loud(name, heard), holder=name) for name in ("a", "b")]
    with suppress(AssertionError):
        houses[0].start()
        add_jobs(database, INGEST)
        wait_until(lambda: heard == ["a"], what="the first relay")
    houses[1].start()
    for number in range(5):
        add_jobs(database, jobs.NewJob(kind="ingest", input={}))
        wait_until(lambda number=number: len(heard) == number + 2, what="a relay")  # type: ignore[misc]
    assert set(heard) == {"a"}

    houses[0].stop()
    add_jobs(database, jobs.NewJob(kind="ingest", input={}))
    wait_until(lambda: heard[-1] == "b", what="the second one's relay")
    houses[1].stop()

    assert len(heard) == 7


def test_what_the_broker_does_not_take_stays(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    add_jobs(database, INGEST)
    nobody = CeleryQueue(f"redis://127.0.0.1:{free_port()}/0")

    keep(database, tmp_path, queue=nobody).relay()
    assert unpublished(database) == 1

    keep(database, tmp_path).relay()
    assert unpublished(database) == 0
    database.close()


def test_a_lease_that_ran_out_is_taken_back(database: Database, tmp_path: Path) -> None:
    [job_id] = add_jobs(database, INGEST)
    with database.transaction() as session:
        jobs.claim(session, holder="silent", capabilities=["cpu"], lease_seconds=60)
    house = keep(database, tmp_path)
    house.lose_jobs()
    assert read_job(database, job_id).status == "running"

    with database.transaction() as session:
        jobs.get_job(session, job_id).lease_until = now(session) - timedelta(seconds=1)
    house.lose_jobs()

    assert read_job(database, job_id).status == "queued"


def test_only_old_files_that_no_row_names_are_removed(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    storage = LocalStorage(tmp_path / "data" / "objects")
    digests = {}
    for name in ("named", "orphan", "young"):
        (tmp_path / name).write_text(name)
        digests[name] = storage.put(tmp_path / name)["digest"]
        if name != "young":
            os.utime(storage.fetch(digests[name]), (0, 0))
    with database.transaction() as session:
        name_files(session, "owner", {"file": {"digest": digests["named"], "num_bytes": 5}})

    keep(database, tmp_path).sweep()

    left = {path.name for path in storage.directory.glob("??/*")}
    assert left == {digests["named"], digests["young"]}
    database.close()


def test_a_housekeeper_whose_clock_is_an_hour_ahead_removes_nothing_that_is_about_to_be_named(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(sqlite_url)
    storage = LocalStorage(tmp_path / "data" / "objects")
    (tmp_path / "fresh").write_text("made by an attempt that ends just now")
    digest = storage.put(tmp_path / "fresh")["digest"]
    house, real = keep(database, tmp_path, orphan_grace_seconds=1800.0), time.time

    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    house.sweep_files()

    assert storage.fetch(digest).exists()
    database.close()


@pytest.mark.parametrize(("status", "age_seconds", "stays"), [("succeeded", 120, False), ("failed", 120, True), ("failed", 10**6, False)])
def test_folders_stay_as_long_as_a_retry_could_use_them(
    sqlite_url: str, tmp_path: Path, status: str, age_seconds: int, stays: bool
) -> None:
    database = Database(sqlite_url)
    [job_id] = add_jobs(database, jobs.NewJob(kind="ingest", input={}))
    with database.transaction() as session:
        job = jobs.get_job(session, job_id)
        job.status, job.finished_at = status, now(session) - timedelta(seconds=age_seconds)
    house = keep(database, tmp_path)
    folder = tmp_path / "data" / "jobs" / job_id
    folder.mkdir(parents=True)

    house.sweep()

    assert folder.exists() == stays
    database.close()


def add_failed(database: Database, directory: Path) -> tuple[str, Path]:
    """A job that failed long ago, and its folder, in which an attempt has been."""
    [job_id] = add_jobs(database, jobs.NewJob(kind="ingest", input={}))
    with database.transaction() as session:
        job = jobs.get_job(session, job_id)
        job.status, job.finished_at = "failed", now(session) - timedelta(days=365)
    folder = directory / "data" / "jobs" / job_id
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "lock").touch()
    return job_id, folder


def test_a_job_that_is_retried_while_folders_are_swept_keeps_its_own(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    house = keep(database, tmp_path)
    (first, folder), (second, other) = add_failed(database, tmp_path), add_failed(database, tmp_path)
    looks: list[list[str]] = []

    def look_then_retry(ids: list[str]) -> list[str]:
        found = house._finished_jobs(ids)
        if not looks:
            with database.transaction() as session:
                jobs.retry(session, first)
        looks.append(sorted(found))
        return found

    house.sweep_folders(tmp_path / "data" / "jobs", look_then_retry)

    assert looks[0] == sorted([first, second])
    assert (folder / "checkpoints").is_dir()
    assert not other.exists()
    database.close()


def test_a_folder_in_which_somebody_works_is_left_alone(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    house = keep(database, tmp_path)
    _, folder = add_failed(database, tmp_path)

    with alone_in(folder):
        house.sweep()
        assert (folder / "checkpoints").is_dir()
    house._host_swept_at = float("-inf")
    house.sweep()

    assert list(folder.parent.iterdir()) == []
    database.close()


def test_what_a_sweep_that_died_left_half_removed_goes_with_the_next(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    _, folder = add_failed(database, tmp_path)
    folder.rename(folder.with_name(f".removed-{folder.name}"))

    keep(database, tmp_path).sweep()

    assert list(folder.parent.iterdir()) == []
    database.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_housekeeping_that_dies_says_so(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings, heard = make_settings(tmp_path, database), list[Exception]()
    add_jobs(database, jobs.NewJob(kind="ingest", input={}))

    class Broken:
        """A queue with a defect of its own."""

        def publish(self, job_id: str, *, capability: str) -> None:
            raise ZeroDivisionError(job_id)

    house = Housekeeping(settings, database, LocalStorage(settings.objects_directory), Broken(), holder="a", on_crash=heard.append)
    house.start()
    wait_until(lambda: heard, what="the report")
    house.stop()

    assert isinstance(heard[0], ZeroDivisionError)
    database.close()


def test_nothing_is_written_while_there_is_nothing_to_do(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    house = keep(database, tmp_path)
    house.keep_house()
    wal = Path(sqlite_url.removeprefix("sqlite:///") + "-wal")
    before = wal.stat().st_size if wal.exists() else 0

    started = time.monotonic()
    for _ in range(20):
        house.keep_house()

    assert (wal.stat().st_size if wal.exists() else 0) == before
    assert time.monotonic() - started < 10
    database.close()


def test_who_does_not_keep_house_looks_without_waiting_for_the_lease(database: Database, tmp_path: Path) -> None:
    with database.transaction() as session:
        hold_singleton(session, "housekeeping", holder="a", seconds=60)
    other = keep(database, tmp_path, holder="b")

    with database.transaction() as session:
        session.execute(sa.select(SingletonLease).with_for_update())
        # Would wait for that row, and end with an error, if it asked for the lease instead of reading.
        assert other._hold() is False
