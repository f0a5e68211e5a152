"""An API on a migrated SQLite file, called in process or over a real socket, and rows as workers would leave them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.testclient import TestClient

from core.db import jobs as rows
from core.db.api_keys import create_api_key
from core.db.datasets import add_version, create_dataset
from core.db.runs import create_run
from core.db.schema import migrate
from core.db.session import Database, now
from core.db.tables import DatasetVersion, Job, Run, Worker
from core.db.workers import WorkerDescription, register_worker
from core.settings import Settings
from server.__main__ import make_server, open_socket
from server.app import create_app
from server.dependencies import Services

HOLDER = "worker-1"


def make_settings(directory: Path, **values: Any) -> Settings:
    """Settings on a data directory of the test's own."""
    defaults: dict[str, Any] = {"data_directory": directory / "data", "require_keys": False, "dataset_roots": (directory,)}
    return Settings(**(defaults | values))


@dataclass(frozen=True, slots=True)
class Api:
    """An app, a client in front of it, and its database."""

    app: FastAPI
    client: Any
    services: Services

    @property
    def database(self) -> Database:
        return self.services.database

    def key(self, *scopes: str) -> dict[str, str]:
        """Headers of a new key with these scopes."""
        with self.database.transaction() as session:
            _, secret = create_api_key(session, name="test", scopes=list(scopes))
        return {"Authorization": f"Bearer {secret}"}


def make_app(directory: Path, **values: Any) -> FastAPI:
    """The app over a migrated database."""
    settings = make_settings(directory, **values)
    settings.data_directory.mkdir(parents=True, exist_ok=True)
    app = create_app(settings)
    migrate(app.state.services.database)
    return app


@contextmanager
def api_in_process(directory: Path, **values: Any) -> Iterator[Api]:
    """Requests go straight into the app."""
    app = make_app(directory, **values)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield Api(app, client, app.state.services)


@contextmanager
def api_on_a_socket(directory: Path, **values: Any) -> Iterator[Api]:
    """Requests go through a real socket and the server that `python -m server` runs."""
    app = make_app(directory, **values)
    listener = open_socket("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api")
    thread.start()
    try:
        wait_until(lambda: server.started)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
            yield Api(app, client, app.state.services)
    finally:
        app.state.services.progress.stopping = True
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def wait_until(condition: Any, *, seconds: float = 20) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def add_job(database: Database, **values: Any) -> Job:
    """A queued job."""
    with database.transaction() as session:
        wanted: dict[str, Any] = {"kind": "import", "input": {"folder": "/nowhere", "name": "test"}} | values
        [job] = rows.enqueue(session, [rows.NewJob(**wanted)])
        return job


def start_job(database: Database, job_id: str) -> Job:
    """The job as running."""
    with database.transaction() as session:
        job = rows.claim(session, holder=HOLDER, capabilities=["cpu"], lease_seconds=600, job_id=job_id)
        assert job is not None
        return job


def report(database: Database, job: Job, *items: tuple[str, dict[str, Any]]) -> None:
    """Events of a running job."""
    with database.transaction() as session:
        assert rows.report(session, job.id, token=job.token, items=items)


def succeed(database: Database, job: Job) -> None:
    """The job as succeeded."""
    with database.transaction() as session:
        assert rows.succeed(session, job.id, token=job.token, result={"done": True}) is not None


def fail(database: Database, job: Job) -> None:
    """The job as failed for good."""
    error = {"class": "permanent", "code": "broken", "message": "it broke"}
    with database.transaction() as session:
        assert rows.fail(session, job.id, token=job.token, error=error, backoff_seconds=0) is not None


def add_ready_version(database: Database, name: str, kind: str) -> DatasetVersion:
    """A dataset's version that is ready, without files."""
    with database.transaction() as session:
        version, _ = add_version(session, create_dataset(session, name=name, kind=kind), source={"folder": "/nowhere"}, ingest=False)
        version.status, version.num_images, version.num_usable, version.class_names = "ready", 10, 10, ["a", "b"]
        return version


def add_run(database: Database) -> tuple[Run, Job]:
    """An active run with its first training job."""
    labeled = add_ready_version(database, "labeled", "labeled")
    unlabeled = add_ready_version(database, "unlabeled", "unlabeled")
    recipe = {"runtime": {"device": "cpu"}}
    with database.transaction() as session:
        run, job = create_run(
            session,
            name="run",
            recipe=recipe,
            iterations=1,
            labeled=labeled,
            unlabeled=unlabeled,
            validation=None,
            test=None,
            initial_generation_id=None,
        )
        assert job is not None
        return run, job


def add_worker(
    database: Database, name: str = HOLDER, *, capabilities: tuple[str, ...] = ("cpu",), silent_seconds: float = 0, **values: Any
) -> Worker:
    """A worker that was last seen so long ago."""
    described: dict[str, Any] = {"host": "host", "boot_id": "boot", "pid": 1, "slots": 2, "version": "0"} | values
    with database.transaction() as session:
        worker = register_worker(session, WorkerDescription(name=name, capabilities=capabilities, **described))
        worker.seen_at = now(session) - timedelta(seconds=silent_seconds)
        return worker
