"""Rows and files as a healthy service leaves them, and the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.files import name_files
from core.db.generations import register_generation
from core.db.promotions import move_alias
from core.db.runs import create_run, last_iteration, move_run
from core.db.session import Database
from core.db.tables import DatasetVersion, Generation, Job
from core.storage import LocalStorage


def command(*arguments: str, directory: Path, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `noisy-student` as a person would, in a folder of the test's own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOISY_STUDENT_")}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=directory,
        env=inherited | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class History:
    """What `lead_a_life` made."""

    run_id: str
    teacher_id: str
    student_id: str
    imported_id: str


def lead_a_life(database: Database, storage: LocalStorage, directory: Path) -> History:
    """A completed run with a teacher that was lost once, an import, a canceled job that was retried, promotions and a rollback."""
    labeled = _ready_version(database, storage, directory, "labeled")
    unlabeled = _ready_version(database, storage, directory, "unlabeled")
    with database.transaction() as session:
        run, job = create_run(
            session,
            name="run",
            recipe={"runtime": {"device": "cpu"}},
            iterations=0,
            labeled=labeled,
            unlabeled=unlabeled,
            validation=None,
            test=None,
            initial_generation_id=None,
        )
    assert job is not None
    _lose_once(database, job)
    teacher = _finish(database, storage, directory, job, role="teacher")
    with database.transaction() as session:
        iteration = last_iteration(session, run.id)
        iteration.phase, iteration.generation_id = "done", teacher.id
        move_run(session, run.id, "completed")
    imported = [_import(database, storage, directory, name) for name in ("first", "second")]
    with database.transaction() as session:
        for version, generation in enumerate((teacher, *imported)):
            move_alias(session, "production", generation.id, expected_version=version or None, action="promote", actor=None)
        move_alias(session, "production", imported[0].id, expected_version=3, action="rollback", actor=None)
    return History(run.id, teacher.id, imported[0].id, imported[1].id)


def _ready_version(database: Database, storage: LocalStorage, directory: Path, kind: str) -> DatasetVersion:
    stored = _store(storage, directory, "manifest.parquet", f"manifest of {kind}")
    with database.transaction() as session:
        version, _ = add_version(session, create_dataset(session, name=kind, kind=kind), source={"folder": "/data"}, ingest=False)
        facts = {"num_images": 3, "num_usable": 3, "class_names": ["a", "b"]}
        finish_version(session, version.id, manifest=stored | facts, report={})
        return version


def _store(storage: LocalStorage, directory: Path, name: str, content: str) -> dict[str, Any]:
    path = directory / name
    path.write_text(content, encoding="utf-8")
    return storage.put(path)


def claim(database: Database, job: Job) -> Job:
    """The job as running."""
    with database.transaction() as session:
        claimed = jobs.claim(session, holder="worker", capabilities=["cpu"], lease_seconds=60, job_id=job.id)
    assert claimed is not None
    return claimed


def _lose_once(database: Database, job: Job) -> None:
    claimed = claim(database, job)
    error = {"class": "retryable", "code": "attempt.lost", "message": "the attempt's process died"}
    with database.transaction() as session:
        jobs.report(session, job.id, token=claimed.token, items=[("progress", {"done": 1, "total": 2})])
        jobs.fail(session, job.id, token=claimed.token, error=error, backoff_seconds=0)


def _import(database: Database, storage: LocalStorage, directory: Path, name: str) -> Generation:
    with database.transaction() as session:
        wanted = jobs.NewJob(kind="import", input={"folder": "/data", "name": name}, generation_id=f"gen_{name}")
        [job] = jobs.enqueue(session, [wanted])
        jobs.request_cancel(session, job.id)
        jobs.retry(session, job.id)
    return _finish(database, storage, directory, job, role="imported")


def _finish(database: Database, storage: LocalStorage, directory: Path, job: Job, *, role: str) -> Generation:
    claimed = claim(database, job)
    files = {"model.safetensors": _store(storage, directory, "model.safetensors", f"weights of {job.id}")}
    log = {"attempt-1.log": _store(storage, directory, "attempt-1.log", f"log of {job.id}")}
    metrics = {"role": role, "architecture": "test_resnet", "num_parameters": 1}
    with database.transaction() as session:
        jobs.report(session, job.id, token=claimed.token, items=[("metric", {"step": 1, "loss": 0.5})])
        done = jobs.succeed(session, job.id, token=claimed.token, result={})
        assert done is not None
        name_files(session, job.id, log)
        return register_generation(session, done, {"files": files, "metrics": metrics, "class_names": ["a", "b"]})
