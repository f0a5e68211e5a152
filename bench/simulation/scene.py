"""The stage of a simulation: PostgreSQL, Redis, the API, a run over a pool that exists only as rows, and the processes of the workers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from bench.service import STOP_SECONDS, Service, free_port, migrate
from bench.simulation.keeper import keep
from bench.simulation.plan import SHARD_SIZE, SPAWN, Notes, Plan, Shared
from bench.simulation.worker import work
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.runs import create_run, get_run
from core.db.session import Database
from core.db.tables import DatasetVersion, PseudoLabelSet
from core.settings import Settings
from core.storage import make_storage
from ml.recipes import build_recipe
from ml.validation import to_dict
from tests.builders_services import create_database, running_postgresql, running_redis

MAX_CONNECTIONS = 600
_START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A service and a run that is about to be worked on."""

    shared: Shared
    service: Service
    database: Database
    run_id: str

    def run_status(self) -> str:
        with self.database.reading() as session:
            return get_run(session, self.run_id).status

    def set_id(self) -> str | None:
        """The pseudo-label set, once the teacher is trained."""
        with self.database.reading() as session:
            return session.scalar(sa.select(PseudoLabelSet.id).where(PseudoLabelSet.run_id == self.run_id))


@contextmanager
def setting(plan: Plan, directory: Path) -> Iterator[Scene]:
    """Everything but the workers is up."""
    with running_postgresql(max_connections=MAX_CONNECTIONS) as postgresql, running_redis() as redis_url:
        url = create_database(postgresql, "simulation")
        settings = Settings(
            database_url=url,
            data_directory=directory / "data",
            redis_url=redis_url,
            lease_seconds=plan.lease_seconds,
            poll_seconds=plan.poll_seconds,
        )
        environment = {
            "NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data"),
            "NOISY_STUDENT_DATABASE_URL": url,
            "NOISY_STUDENT_REDIS_URL": redis_url,
            "NOISY_STUDENT_LEASE_SECONDS": str(plan.lease_seconds),
            "NOISY_STUDENT_PORT": str(port := free_port()),
        }
        service = Service(directory, port, environment)
        migrate(service)
        tiny = directory / "tiny"
        tiny.write_bytes(b"stands for every file that the simulation would make")
        stored = make_storage(settings).put(tiny)
        database = Database(url)
        service.start("api", sys.executable, "-m", "server")
        try:
            service.wait_ready()
            shared = Shared(plan=plan, settings=settings, directory=directory, stored=stored)
            yield Scene(shared=shared, service=service, database=database, run_id=add_run(database, plan, stored))
        finally:
            service.stop()
            database.close()


def add_run(database: Database, plan: Plan, stored: dict[str, Any]) -> str:
    """A teacher, `plan.shards` shards, a selection, a student: all jobs are made by the controller when their time has come."""
    recipe = {"labeling": {"shard_size": SHARD_SIZE}, "iterations": {"control": False}, "runtime": {"device": "cpu"}}
    with database.transaction() as session:
        run, _ = create_run(
            session,
            name="simulation",
            recipe=to_dict(build_recipe("digits", recipe)),
            iterations=1,
            labeled=_version(session, "labeled", 1000, stored),
            unlabeled=_version(session, "unlabeled", plan.shards * SHARD_SIZE, stored),
            validation=None,
            test=None,
            initial_generation_id=None,
        )
        return run.id


def _version(session: Session, kind: str, num_images: int, stored: dict[str, Any]) -> DatasetVersion:
    version, _ = add_version(session, create_dataset(session, name=kind, kind=kind), source={"folder": "/pool"}, ingest=False)
    facts = stored | {"num_images": num_images, "num_usable": num_images, "class_names": ["cat", "dog"]}
    finish_version(session, version.id, manifest=facts, report={})
    return version


@contextmanager
def working(scene: Scene, notes: Notes) -> Iterator[None]:
    """The keeper of the house and all workers are there; at the end what they saw is in `notes`."""
    shared, plan = scene.shared, scene.shared.plan
    processes = [SPAWN.Process(target=keep, args=(shared,))]
    for number in range(plan.processes):
        size = len(range(number, plan.workers, plan.processes))
        processes.append(SPAWN.Process(target=work, args=(shared, number, size)))
    try:
        for number, process in enumerate(processes, start=1):
            process.start()
            _wait_for(process, shared, number)
        shared.begin.set()
        yield
    finally:
        shared.begin.set()
        shared.stop.set()
        for process in processes:
            _end(process)
    for path in sorted(shared.directory.glob("*.notes.json")):
        notes.add(path)


def _wait_for(process: SpawnProcess, shared: Shared, number: int) -> None:
    """One after the other: the keeper has the lease before anybody else asks for it."""
    end = time.monotonic() + _START_SECONDS
    while shared.ready.value < number:
        if not process.is_alive() or time.monotonic() > end:
            raise RuntimeError(f"process {process.pid} of the simulation did not begin within {_START_SECONDS} s")
        time.sleep(0.02)


def _end(process: SpawnProcess) -> None:
    if process.pid is None:
        return
    process.join(2 * STOP_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
