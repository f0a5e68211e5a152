"""Workers as processes, and jobs for them: everything valid, every setting overridable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from core.db.datasets import add_version, create_dataset
from core.db.events import list_job_events
from core.db.jobs import NewJob, enqueue, get_job
from core.db.session import Database
from core.db.tables import Event, Job
from core.lifecycle import JOB_TERMINAL
from core.settings import Settings
from tests.builders_services import wait_until
from tests.ml.builders_images import write_class_folders
from workers.worker import FullWorker

# The stall limit covers the start of a process on a busy machine; the rest makes things happen within tenths of seconds.
FAST = {
    "lease_seconds": 3.0,
    "poll_seconds": 0.1,
    "housekeeping_seconds": 0.1,
    "grace_seconds": 5.0,
    "stall_seconds": 300.0,
    "retry_backoff_seconds": 0.05,
}


def make_settings(directory: Path, database: Database, **values: Any) -> Settings:
    """Settings of a quick worker in `directory`."""
    url = database.url
    return Settings(**{"data_directory": directory / "data", "database_url": url, **FAST, **values})


class WorkerProcess:
    """A real `python -m workers` (or another command) with these settings; its log is a file."""

    def __init__(self, settings: Settings, log: Path, *command: str) -> None:
        self.log_path = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NOISY_STUDENT_")}
        for name, value in settings.model_dump(exclude_none=True, exclude_defaults=True).items():
            joined = {"dataset_roots": ":", "capabilities": ","}.get(name)
            environment[f"NOISY_STUDENT_{name.upper()}"] = joined.join(map(str, value)) if joined else str(value)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *(command or ("workers",))], env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of one event."""
        lines = [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines() if line.startswith('{"')]
        return [line for line in lines if line.get("event") == event]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as a power cut."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, as an orderly stop; its exit status."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def running_worker(settings: Settings, directory: Path, *command: str, name: str = "worker") -> Iterator[WorkerProcess]:
    """A worker for the length of a block."""
    worker = WorkerProcess(settings, directory / f"{name}.log", *command)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.signal(signal.SIGCONT)
            worker.process.kill()
        worker.process.wait()


def children_of(pid: int) -> list[int]:
    """Process ids of the attempts that a worker runs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            attempt = b"workers.attempt" in (stat.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if attempt and int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def add_ingest(database: Database, folder: Path, *, kind: str = "labeled", name: str = "photos") -> str:
    """A dataset with a version to read; the job's id."""
    with database.transaction() as session:
        _, job = add_version(session, create_dataset(session, name=name, kind=kind), source={"folder": str(folder)})
        assert job is not None
        return job.id


def add_jobs(database: Database, *wanted: NewJob) -> list[str]:
    """Jobs that wait; their ids."""
    with database.transaction() as session:
        return [job.id for job in enqueue(session, wanted)]


def write_folder(directory: Path, *, images: int = 4) -> Path:
    """Two classes with a few images each."""
    return write_class_folders(directory / "images", {"cat": images, "dog": images})


def write_long_folder(directory: Path, *, copies: int = 500) -> Path:
    """The same, and so many copies that nobody reads them to their end before a busy test has found the attempt and frozen it."""
    folder = write_folder(directory)
    image = next((folder / "cat").iterdir())
    for number in range(copies):
        (folder / "cat" / f"copy-{number}{image.suffix}").hardlink_to(image)
    return folder


def read_job(database: Database, job_id: str) -> Job:
    """As the database has it now."""
    with database.reading() as session:
        return get_job(session, job_id)


def read_events(database: Database, job_id: str) -> list[Event]:
    """All of the job's events."""
    with database.reading() as session:
        return list_job_events(session, job_id, after=0, limit=10_000)


def kinds_of(events: list[Event]) -> list[str]:
    """The moves among the events, in order."""
    moves = ("queued", "started", "succeeded", "failed", "canceled", "retrying", "interrupted", "cancel_requested")
    return [event.kind for event in events if event.kind in moves]


def wait_for_end(database: Database, job_id: str, *, seconds: float = 30) -> Job:
    """The job once it has ended for good."""

    def ended() -> Job | None:
        job = read_job(database, job_id)
        return job if job.status in JOB_TERMINAL else None

    job: Job = wait_until(ended, seconds=seconds, what=f"the end of {job_id}")
    return job


def wait_for_status(database: Database, job_id: str, status: str, *, seconds: float = 30) -> Job:
    """The job once it has this status."""
    found: Job = wait_until(
        lambda: (job := read_job(database, job_id)).status == status and job, seconds=seconds, what=f"{job_id} being {status}"
    )
    return found


def count_running(database: Database) -> int:
    """Jobs that some worker holds."""
    with database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Job).where(Job.status == "running")) or 0


@contextmanager
def worker_inside(settings: Settings, **options: Any) -> Iterator[FullWorker]:
    """A worker in this process: threads here, attempts in child processes."""
    worker = FullWorker(settings, **options)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def wait_for_child(database: Database, job_id: str, *, not_pid: int | None = None) -> int:
    """Process id of the attempt that runs the job in a worker inside this process."""

    def found() -> int | None:
        pids = [pid for pid in children_of(os.getpid()) if pid != not_pid]
        return pids[0] if pids and read_job(database, job_id).status == "running" else None

    pid: int = wait_until(found, what=f"the start of an attempt of {job_id}")
    return pid
