"""A worker that vanishes without a word: its successor on the same host takes over at once, others after the lease."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from core.db.session import Database
from core.db.tables import Worker
from core.db.workers import hold_singleton, list_workers
from tests.builders_services import wait_until
from tests.workers.builders import (
    WorkerProcess,
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
from tests.workers.test_attempts import is_gone
from workers.folders import FolderBusy, alone_in
from workers.processes import boot_identity, start_ticks

FOREIGN = "another-boot 1"


def freeze_at_work(directory: Path) -> int:
    """Stop the attempt's process once it has the job's folder for itself; its id."""
    lock = directory / "lock"
    pid = int(wait_until(lambda: lock.exists() and lock.read_text(), what="the attempt at work").partition(" ")[0])
    os.kill(pid, signal.SIGSTOP)
    return pid


@contextmanager
def held_by(directory: Path, name: str) -> Iterator[None]:
    """Somebody of this name works in the folder."""
    with (directory / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(name)
        lock.flush()
        yield


def freeze_outside_a_write(worker: WorkerProcess, database: Database) -> None:
    """Stop the worker. One that stands still in the middle of a write to SQLite holds everybody until it goes on or is killed."""

    def is_frozen() -> bool:
        worker.signal(signal.SIGSTOP)
        if not database.is_sqlite:
            return True
        with closing(sqlite3.connect(database.url.removeprefix("sqlite:///"), timeout=0.5, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except sqlite3.OperationalError:
                worker.signal(signal.SIGCONT)
                return False
        return True

    wait_until(is_frozen, what="a worker that stands still outside of a write")


def test_a_killed_worker_takes_its_attempts_with_it_and_its_successor_goes_on_at_once(database: Database, tmp_path: Path) -> None:
    # So long a lease that nobody waits for it.
    settings = make_settings(tmp_path, database, lease_seconds=600.0, max_attempts=1)
    job_id = add_ingest(database, write_folder(tmp_path))
    with running_worker(settings, tmp_path, name="first") as first:
        child = freeze_at_work(tmp_path / "data" / "jobs" / job_id)
        first.kill()
        wait_until(lambda: is_gone(child), what="the end of the attempt")

    with running_worker(settings, tmp_path, name="second") as second:
        job = wait_for_end(database, job_id)
        assert [line["jobs"] for line in second.lines("worker.predecessor_dead")] == [[job_id]]

    assert (job.status, job.attempt, job.lost_attempts) == ("succeeded", 2, 0)
    assert kinds_of(read_events(database, job_id)) == ["queued", "started", "interrupted", "started", "succeeded"]


def test_a_frozen_worker_is_given_up_on_and_finds_itself_fenced(database: Database, tmp_path: Path) -> None:
    job_id = add_ingest(database, write_folder(tmp_path))
    with running_worker(make_settings(tmp_path, database, lease_seconds=1.5), tmp_path, name="frozen") as frozen:
        child = freeze_at_work(tmp_path / "data" / "jobs" / job_id)
        freeze_outside_a_write(frozen, database)
        with worker_inside(make_settings(tmp_path, database)):
            job = wait_for_end(database, job_id)
        # It stood in the way of its successor, in the same folder.
        assert is_gone(child)

        frozen.signal(signal.SIGCONT)
        wait_until(lambda: any(line["status"] in ("fenced", "succeeded") for line in frozen.lines("attempt.ended")), what="the thaw")

    assert job.status == "succeeded"
    after = read_job(database, job_id)
    assert (after.status, after.token, after.attempt) == (job.status, job.token, job.attempt)
    events = read_events(database, job_id)
    assert kinds_of(events).count("succeeded") == 1
    assert [event.number for event in events] == list(range(1, len(events) + 1))


def test_a_process_of_another_container_is_never_killed_for_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.folders.ELSEWHERE_SECONDS", 0.0)
    monkeypatch.setattr("workers.folders.PREDECESSOR_SECONDS", 0.0)
    innocent = subprocess.Popen([sys.executable, "-c", "input()", "workers.attempt"], stdin=subprocess.PIPE, start_new_session=True)
    elsewhere, before = f"{innocent.pid} {start_ticks(innocent.pid)} {FOREIGN}", f"{innocent.pid} 1 {boot_identity()}"

    for name in (elsewhere, before):
        with held_by(tmp_path, name), pytest.raises(FolderBusy, match=f"{innocent.pid} "), alone_in(tmp_path):
            pass

    assert innocent.poll() is None
    innocent.communicate(b"\n")
    assert innocent.returncode == 0


def test_who_leaves_a_folder_takes_its_name_with_it(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        inside = (tmp_path / "lock").read_text()

    assert inside == f"{os.getpid()} {start_ticks(os.getpid())} {boot_identity()}"
    assert (tmp_path / "lock").read_text() == ""


def test_a_folder_that_another_container_holds_costs_a_pause_and_no_attempt(database: Database, tmp_path: Path) -> None:
    job_id = add_ingest(database, write_folder(tmp_path))
    folder = tmp_path / "data" / "jobs" / job_id
    folder.mkdir(parents=True)

    with worker_inside(make_settings(tmp_path, database, lease_seconds=3.0, max_attempts=1)):
        with held_by(folder, f"1 1 {FOREIGN}"):
            wait_until(lambda: "interrupted" in kinds_of(read_events(database, job_id)), what="the way back to the queue")
            waiting = read_job(database, job_id)
        job = wait_for_end(database, job_id)

    events = read_events(database, job_id)
    [started, interrupted] = [event for event in events if event.kind in ("started", "interrupted")][:2]
    assert (waiting.status, waiting.lost_attempts, started.data["attempt"]) == ("queued", 0, 1)
    assert interrupted.data == {"reason": "attempt.directory_busy"}
    assert waiting.not_before is not None
    assert (waiting.not_before - interrupted.at).total_seconds() == pytest.approx(3.0)
    assert (job.status, job.lost_attempts) == ("succeeded", 0)


def test_the_dead_are_told_from_the_living(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database)

    with running_worker(settings, tmp_path) as worker:
        wait_until(lambda: worker.lines("worker.started"), what="the worker's start")
        with worker_inside(settings):
            with database.reading() as session:
                stopped = {row.pid: row.stopped_at for row in list_workers(session)}
            assert stopped == {worker.process.pid: None, os.getpid(): None}
        worker.kill()
        with worker_inside(settings), database.reading() as session:
            assert [row.stopped_at is None for row in list_workers(session) if row.pid == worker.process.pid] == [False]
    database.close()


def test_a_dead_housekeeper_is_followed_at_once(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    with running_worker(make_settings(tmp_path, database), tmp_path) as worker:
        wait_until(lambda: worker.lines("worker.started"), what="the worker's start")
        with database.reading() as session:
            [row] = session.query(Worker).all()
        worker.kill()
    with database.transaction() as session:
        hold_singleton(session, "housekeeping", holder=row.name, seconds=600)

    with worker_inside(make_settings(tmp_path, database)) as successor:

        def keeps_house() -> bool:
            with database.transaction() as session:
                return hold_singleton(session, "housekeeping", holder=successor.supervisor.name, seconds=6)

        wait_until(keeps_house, what="the successor's housekeeping")
    database.close()
