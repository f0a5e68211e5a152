"""What may befall an attempt: its process dies, freezes, is canceled, interrupted or given up on. Nothing is lost, nothing done twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from core.db import jobs
from core.db.datasets import get_version
from core.db.files import list_files
from core.db.session import Database, now
from core.db.tables import Job
from tests.builders_services import wait_until
from tests.workers.builders import (
    add_ingest,
    children_of,
    kinds_of,
    make_settings,
    read_events,
    read_job,
    wait_for_child,
    wait_for_end,
    wait_for_status,
    worker_inside,
    write_folder,
    write_long_folder,
)


def is_gone(pid: int) -> bool:
    """The process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def frozen_child(database: Database, job_id: str) -> int:
    """The attempt's process, stopped in the middle of whatever it does."""
    pid = wait_for_child(database, job_id)
    os.kill(pid, signal.SIGSTOP)
    return pid


@contextmanager
def killing_every_child() -> Iterator[list[int]]:
    """For the length of the block, every attempt's process is killed as soon as it is seen."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.005):
            for pid in set(children_of(os.getpid())) - set(killed):
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_an_attempt_whose_process_is_killed_is_made_again(database: Database, tmp_path: Path) -> None:
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database)):
        os.kill(frozen_child(database, job_id), signal.SIGKILL)
        job = wait_for_end(database, job_id)

    assert (job.status, job.attempt, job.lost_attempts) == ("succeeded", 2, 1)
    events = read_events(database, job_id)
    assert kinds_of(events) == ["queued", "started", "retrying", "started", "succeeded"]
    assert next(event.data["error"] for event in events if event.kind == "retrying")["message"].endswith("was killed by SIGKILL")


def test_a_job_that_kills_every_attempt_ends_after_its_last(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    job_id = add_ingest(database, write_folder(tmp_path))

    with killing_every_child() as killed, worker_inside(make_settings(tmp_path, database, max_attempts=3)):
        job = wait_for_end(database, job_id)

    assert (job.status, job.attempt, (job.error or {})["code"]) == ("failed", 3, "attempt.lost")
    assert len(killed) == 3
    with database.reading() as session:
        assert get_version(session, job.input["version_id"]).status == "failed"
    database.close()


def test_a_frozen_attempt_loses_its_lease_and_is_made_again(database: Database, tmp_path: Path) -> None:
    # On a busy machine the start of a process alone may take longer than such a limit, hence the many attempts.
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database, stall_seconds=3.0, max_attempts=20)):
        frozen = frozen_child(database, job_id)
        job = wait_for_end(database, job_id, seconds=60)

    assert job.status == "succeeded"
    assert job.attempt > 1
    assert is_gone(frozen)
    assert {e.data["error"]["code"] for e in read_events(database, job_id) if e.kind == "retrying"} == {"attempt.stalled"}


def test_a_slow_attempt_keeps_its_lease(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database, lease_seconds=4.0)):
        pid = frozen_child(database, job_id)
        first = read_job(database, job_id).lease_until
        wait_until(lambda: first is not None and (read_job(database, job_id).lease_until or first) > first + timedelta(seconds=4.5))
        os.kill(pid, signal.SIGCONT)
        job = wait_for_end(database, job_id)

    assert (job.status, job.attempt) == ("succeeded", 1)
    database.close()


def test_a_canceled_attempt_stops_and_its_job_is_canceled(database: Database, tmp_path: Path) -> None:
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database, lease_seconds=30, stall_seconds=60)):
        pid = frozen_child(database, job_id)
        with database.transaction() as session:
            jobs.request_cancel(session, job_id)
        # SIGTERM waits for the process to go on.
        wait_until(lambda: Path(f"/proc/{pid}/status").read_text().split("ShdPnd:")[1].split()[0] != "0" * 16, what="SIGTERM")
        os.kill(pid, signal.SIGCONT)
        job = wait_for_end(database, job_id)

    assert job.status == "canceled"
    assert kinds_of(read_events(database, job_id)) == ["queued", "started", "cancel_requested", "canceled"]
    with database.reading() as session:
        assert get_version(session, job.input["version_id"]).status == "failed"


def test_an_attempt_that_does_not_stop_in_time_is_killed_and_canceled(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database, grace_seconds=0.5)):
        pid = frozen_child(database, job_id)
        with database.transaction() as session:
            jobs.request_cancel(session, job_id)
        job = wait_for_end(database, job_id)

    assert job.status == "canceled"
    assert is_gone(pid)
    database.close()


def test_a_worker_that_stops_gives_its_job_back_at_no_cost(database: Database, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, database, grace_seconds=0.5, max_attempts=1)
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(settings):
        pid = frozen_child(database, job_id)
    interrupted = read_job(database, job_id)
    with worker_inside(settings):
        job = wait_for_end(database, job_id)

    assert (interrupted.status, interrupted.lost_attempts, interrupted.lease_holder) == ("queued", 0, None)
    assert is_gone(pid)
    assert (job.status, job.attempt) == ("succeeded", 2)


def test_an_attempt_that_was_given_up_on_is_killed_and_writes_nothing(database: Database, tmp_path: Path) -> None:
    job_id = add_ingest(database, write_long_folder(tmp_path))

    def claim() -> Job | None:
        with database.transaction() as session:
            return jobs.claim(session, holder="other", capabilities=["cpu"], lease_seconds=60)

    # A lease that a busy machine cannot lose by itself.
    with worker_inside(make_settings(tmp_path, database, lease_seconds=60.0)) as worker:
        pid = frozen_child(database, job_id)
        held = read_job(database, job_id)
        # What housekeeping does once a lease has run out, and another worker after it.
        worker.supervisor.capabilities = ("none",)
        with database.transaction() as session:
            jobs.get_job(session, job_id).lease_until = now(session) - timedelta(seconds=1)
            jobs.lose_expired(session, backoff_seconds=0)
        # A claim passes over a row that the relay holds just then.
        wait_until(claim, what="the successor's claim")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: is_gone(pid), seconds=60, what="the end of the fenced attempt")
    # A worker that has stopped has written whatever it would write.
    job = read_job(database, job_id)

    assert held.token == 1
    assert (job.status, job.token, job.lease_holder, job.result) == ("running", 2, "other", None)
    assert kinds_of(read_events(database, job_id)) == ["queued", "started", "retrying", "started"]
    with database.reading() as session:
        assert list_files(session, job.input["version_id"]) == []
        assert get_version(session, job.input["version_id"]).status == "pending"


def test_a_job_whose_stored_input_is_gone_fails_before_a_process_is_started(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    wanted = jobs.NewJob(kind="split", input={"source_version_id": "dsv_gone", "targets": {}, "seed": 0})
    with database.transaction() as session:
        jobs.enqueue(session, [wanted])

    with worker_inside(make_settings(tmp_path, database)):
        job = wait_for_end(database, wanted.id)

    assert (job.status, (job.error or {})["code"]) == ("failed", "input.missing")
    database.close()


def test_a_job_that_makes_no_sense_fails_and_the_worker_goes_on(database: Database, tmp_path: Path) -> None:
    odd = jobs.NewJob(kind="ingest", input={})
    with database.transaction() as session:
        jobs.enqueue(session, [odd])
    job_id = add_ingest(database, write_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database)) as worker:
        failed, job = wait_for_end(database, odd.id), wait_for_end(database, job_id)
        assert not worker.supervisor.crashed.is_set()

    assert (failed.status, (failed.error or {})["code"]) == ("failed", "attempt.surprise")
    assert job.status == "succeeded"


def test_a_full_disk_is_worth_another_attempt(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database, retry_backoff_seconds=0.5)
    job_id = add_ingest(database, write_folder(tmp_path))
    # A file where the folder of objects should be: nothing can be stored until it is gone.
    settings.data_directory.mkdir()
    settings.objects_directory.touch()

    with worker_inside(settings):
        wait_until(lambda: "retrying" in kinds_of(read_events(database, job_id)), what="a retry")
        settings.objects_directory.unlink()
        job = wait_for_end(database, job_id)

    assert job.status == "succeeded"
    [error] = {event.data["error"]["class"] for event in read_events(database, job_id) if event.kind == "retrying"}
    assert error == "retryable"
    database.close()


def test_the_attempts_process_knows_no_secret_and_no_database(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(sqlite_url)
    monkeypatch.setenv("NOISY_STUDENT_DATABASE_URL", "postgresql://user:secret@host/rows")
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    job_id = add_ingest(database, write_long_folder(tmp_path))

    with worker_inside(make_settings(tmp_path, database)):
        pid = frozen_child(database, job_id)
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        os.kill(pid, signal.SIGCONT)
        wait_for_status(database, job_id, "succeeded")

    assert b"user:secret@host" not in environment
    assert b"PGPASSWORD" not in environment
    assert b"AWS_" not in environment
    assert b"NOISY_STUDENT_" not in environment
    database.close()
