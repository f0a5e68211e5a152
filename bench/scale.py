"""A service that was used for years: API reads, a controller pass, claims, over 10⁶ jobs, 10⁵ generations and a set of 30 000 shards.

By hand: `python -m bench scale`, some ten minutes, most of which it takes to fill the database.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from sqlalchemy.orm import Session

from bench.measurement import Measurement
from bench.service import Service, free_port, migrate
from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.generations import register_generation
from core.db.pseudo_labels import create_set, write_next_jobs
from core.db.runs import create_run, last_iteration
from core.db.session import Database, now
from core.db.tables import Event, Generation, Iteration, Job, Run
from core.db.workers import list_unpublished
from core.queue import PollingOnly
from core.settings import Settings
from core.storage import LocalStorage
from ml.recipes import get_recipe
from ml.validation import to_dict
from tests.builders_services import create_database, running_postgresql
from workers.controller import advance_set
from workers.housekeeping import Housekeeping

JOBS, GENERATIONS, RUNS, ITERATIONS, SHARDS = 1_000_000, 100_000, 1_000, 10, 30_000
SHARD_SIZE = 10_000
REPEATS = 200
PASSES = 30
FILL_SECONDS = 1800.0


def measure() -> Measurement:
    found = Measurement(name="scale", details={"jobs": JOBS, "generations": GENERATIONS, "shards": SHARDS, "images": SHARDS * SHARD_SIZE})
    directory = Path(tempfile.mkdtemp(prefix="bench-scale-"))
    try:
        with running_postgresql(shared_buffers="128MB") as postgresql:
            url = create_database(postgresql, "scale")
            service = Service(directory, port := free_port(), _environment(directory, url, port))
            migrate(service)
            settings = Settings(database_url=url, data_directory=directory / "data")
            # One statement copies a million rows: neither PostgreSQL nor this end of the connection may give up on it after a minute.
            filler = Database(settings.resolved_database_url, silence_seconds=FILL_SECONDS)
            filled = Filled.fill(filler)
            filler.close()
            database = Database(settings.resolved_database_url)
            found.details["seconds to write the set of 30 000 shards"] = sum(filled.slices)
            found.details["longest transaction of it, s"] = max(filled.slices)
            _measure_inside(found, settings, database, filled)
            service.start("api", sys.executable, "-m", "server")
            try:
                service.wait_ready()
                _measure_reads(found, service, filled)
            finally:
                service.stop()
            database.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _environment(directory: Path, url: str, port: int) -> dict[str, str]:
    return {
        "NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data"),
        "NOISY_STUDENT_DATABASE_URL": url,
        "NOISY_STUDENT_PORT": str(port),
    }


@dataclass(frozen=True, slots=True)
class Filled:
    """Ids of rows among the many, and how long the service's own way of making the set took."""

    run_id: str
    job_id: str
    generation_id: str
    set_id: str
    slices: list[float]

    @classmethod
    def fill(cls, database: Database) -> Filled:
        """One of each kind by the service's own code, then copies of them by SQL."""
        with database.transaction() as session:
            run, job = create_run(
                session,
                name="long ago",
                recipe=to_dict(get_recipe("digits")),
                iterations=0,
                labeled=_version(session, "labeled"),
                unlabeled=(unlabeled := _version(session, "unlabeled")),
                validation=None,
                test=None,
                initial_generation_id=None,
            )
            assert job is not None
            held = jobs.claim(session, holder="worker", capabilities=["cpu"], lease_seconds=60, job_id=job.id)
            assert held is not None
            done = jobs.succeed(session, job.id, token=held.token, result={})
            assert done is not None
            metrics = {"role": "teacher", "architecture": "test_resnet", "num_parameters": 1}
            files = {"model.safetensors": {"digest": "0" * 64, "num_bytes": 1}}
            generation = register_generation(session, done, {"files": files, "metrics": metrics, "class_names": ["a", "b"]})
        with database.transaction() as session:
            session.execute(sa.update(Run).where(Run.id == run.id).values(status="completed"))
            session.execute(sa.text("SET LOCAL statement_timeout = 0"))
            copies = "'job_' || lpad(to_hex(g), 26, '0')"
            status = "CASE WHEN g % 100 = 0 THEN 'failed' ELSE t.status END"
            places = {"run_id": _one_of_runs("g"), "iteration": _one_of_iterations("g"), "part": f"g / {RUNS * ITERATIONS}"}
            _copy(session, Job, job.id, JOBS, id=copies, status=status, generation_id="NULL", **places)
            _copy(session, Run, run.id, RUNS, id=_one_of_runs("g"))
            first = last_iteration(session, run.id).id
            own = {"id": "'itr_' || lpad(to_hex(g), 26, '0')", "run_id": _one_of_runs("g"), "number": _one_of_iterations("g")}
            _copy(session, Iteration, first, RUNS * ITERATIONS, **own)
            _copy(session, Generation, generation.id, GENERATIONS, id="'gen_' || lpad(to_hex(g), 26, '0')", job_id=copies)
            _copy_events(session, job.id)
        with database.engine().execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            # What autovacuum does within minutes.
            connection.execute(sa.text("SET statement_timeout = 0"))
            connection.execute(sa.text("VACUUM ANALYZE"))
        set_id, slices = _write_set(database, generation.id, unlabeled.id)
        with database.transaction() as session:
            half = sa.select(Job.id).where(Job.pseudo_label_set_id == set_id).order_by(Job.id).limit(SHARDS // 2)
            session.execute(sa.update(Job).where(Job.id.in_(half)).values(status="succeeded", finished_at=now(session)))
            # Statistics only: rows are as they lie in a service that works.
            session.execute(sa.text("ANALYZE"))
        return cls(run.id, job.id, generation.id, set_id, slices)


def _write_set(database: Database, generation_id: str, version_id: str) -> tuple[str, list[float]]:
    """The large set as the service writes it down; its id, and how long each transaction took."""
    started = time.monotonic()
    with database.transaction() as session:
        row = create_set(
            session,
            generation_id=generation_id,
            unlabeled_version_id=version_id,
            num_images=SHARDS * SHARD_SIZE,
            labeling={"shard_size": SHARD_SIZE},
            selection={},
            seed=0,
            capability="cpu",
            runtime={"device": "cpu"},
            evaluation_version_ids=[],
        )
    slices, is_missing = [time.monotonic() - started], True
    while is_missing:
        started = time.monotonic()
        with database.transaction() as session:
            is_missing = write_next_jobs(session, row.id)
        slices.append(time.monotonic() - started)
    return row.id, slices


def _one_of_runs(number: str) -> str:
    return f"'run_' || lpad(to_hex(1 + {number} % {RUNS}), 26, '0')"


def _one_of_iterations(number: str) -> str:
    return f"1 + {number} / {RUNS} % {ITERATIONS}"


def _version(session: Session, kind: str) -> Any:
    version, _ = add_version(session, create_dataset(session, name=kind, kind=kind), source={"folder": "/data"}, ingest=False)
    number = SHARDS * SHARD_SIZE
    facts = {"num_images": number, "num_usable": number, "class_names": ["a", "b"], "digest": "0" * 64, "num_bytes": 1}
    finish_version(session, version.id, manifest=facts, report={})
    return version


def _copy(session: Session, table: type[Job | Run | Iteration | Generation], template: str, copies: int, **columns: str) -> None:
    """`copies` of a row, numbered g from 1, with some columns by an expression of g."""
    names = [column.name for column in table.__table__.columns]
    values = ", ".join(columns.get(name, f"t.{name}") for name in names)
    name, source = table.__tablename__, f"{table.__tablename__} t, generate_series(1, {copies}) g"
    # Rows are copied before the runs that they name.
    session.execute(sa.text("SET session_replication_role = replica"))
    insert = f"INSERT INTO {name} ({', '.join(names)}) SELECT {values} FROM {source} WHERE t.id = :template"
    session.execute(sa.text(insert), {"template": template})
    session.execute(sa.text("SET session_replication_role = DEFAULT"))


def _copy_events(session: Session, job_id: str) -> None:
    names = [column.name for column in Event.__table__.columns]
    own = {"job_id": "'job_' || lpad(to_hex(g), 26, '0')", "run_id": "NULL", "run_number": "NULL"}
    values = ", ".join(own.get(name, f"t.{name}") for name in names)
    source = f"events t, generate_series(1, {JOBS}) g WHERE t.job_id = :template"
    session.execute(sa.text(f"INSERT INTO events ({', '.join(names)}) SELECT {values} FROM {source}"), {"template": job_id})


def _measure_inside(found: Measurement, settings: Settings, database: Database, filled: Filled) -> None:
    """What workers and housekeeping ask of the database while the set is being labeled."""
    keeper = Housekeeping(settings, database, LocalStorage(settings.objects_directory), PollingOnly(), holder="bench")

    def claim(*capabilities: str) -> None:
        with database.transaction() as session:
            job = jobs.claim(session, holder="bench", capabilities=capabilities, lease_seconds=600)
            assert job is not None

    def claim_shard() -> None:
        with database.transaction() as session:
            job = jobs.claim(session, holder="bench", capabilities=["cpu"], lease_seconds=600, pseudo_label_set_id=filled.set_id)
            assert job is not None

    # 30 000 hints go out first, turn after turn of the relay: a pass is timed when only what is new is left.
    while _has_hints(database):
        keeper.relay()
    turns: dict[str, Callable[[], object]] = {
        "controller pass (all of housekeeping's turn)": keeper.keep_house,
        "what follows a shard's end": lambda: advance_set(database, filled.set_id),
        "claim of any job": lambda: claim("cpu"),
        "claim of any job, cuda or cpu": lambda: claim("cuda", "cpu"),
        "claim of the set's next shard": claim_shard,
    }
    rows = []
    for what, turn in turns.items():
        seconds = [_timed(turn) for _ in range(PASSES)]
        found.details[what] = seconds
        rows.append({"what": what, "median": statistics.median(seconds), "highest": max(seconds)})
    found.tables["Inside, seconds"] = rows
    found.figures["scale-controller-pass"] = max(found.details["controller pass (all of housekeeping's turn)"])


def _has_hints(database: Database) -> bool:
    with database.reading() as session:
        return bool(list_unpublished(session, limit=1))


def _measure_reads(found: Measurement, service: Service, filled: Filled) -> None:
    paths = [
        "/api/v1/jobs",
        "/api/v1/jobs?status=queued",
        "/api/v1/jobs?status=failed",
        "/api/v1/jobs?kind=train",
        "/api/v1/jobs?kind=train&status=failed",
        f"/api/v1/jobs?run_id={filled.run_id}",
        f"/api/v1/jobs/{filled.job_id}",
        f"/api/v1/jobs/{filled.job_id}/events?after=0",
        "/api/v1/runs",
        "/api/v1/runs?status=active",
        f"/api/v1/runs/{filled.run_id}",
        f"/api/v1/runs/run_{1:026x}",
        f"/api/v1/runs/run_{1:026x}/iterations",
        f"/api/v1/runs/{filled.run_id}/lineage",
        "/api/v1/generations",
        "/api/v1/generations?role=imported",
        f"/api/v1/generations/{filled.generation_id}",
        f"/api/v1/pseudo-label-sets/{filled.set_id}",
        "/api/v1/pseudo-label-sets",
        "/api/v1/datasets",
        "/api/v1/queues",
        "/api/v1/workers",
        "/metrics",
    ]
    rows, worst = [], 0.0
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}, timeout=60) as client:
        for path in paths:
            status = client.get(path).status_code
            if status != 200:
                raise RuntimeError(f"{path} answers {status}")
            seconds = sorted(_timed(partial(client.get, path)) for _ in range(REPEATS))
            high = seconds[math.ceil(0.99 * REPEATS) - 1]
            rows.append({"path": path.split("_")[0], "median ms": 1000 * statistics.median(seconds), "p99 ms": 1000 * high})
            worst = max(worst, high)
    found.tables[f"Reads, {REPEATS} each"] = rows
    found.figures["scale-reads-p99"] = 1000 * worst


def _timed(turn: Callable[[], object]) -> float:
    started = time.perf_counter()
    turn()
    return time.perf_counter() - started
