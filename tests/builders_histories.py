"""Whole histories as rows and stored files, as workers would leave them, without any attempt: for deletion, retention and sweeps."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.promotions import move_alias
from core.db.pseudo_labels import create_set
from core.db.runs import create_run
from core.db.session import Database
from core.db.tables import Alias, DatasetVersion, Generation, IdempotencyRecord, Iteration, Job, PseudoLabelSet, StoredFile, Worker
from core.ids import new_id
from core.storage import LocalStorage
from ml.recipes import build_recipe
from ml.validation import to_dict
from workers.controller import advance_all
from workers.outcomes import record_success

NUM_IMAGES = 40
SHARD_SIZE = 16
NUM_SHARDS = 3
LABELING: dict[str, Any] = {"shard_size": SHARD_SIZE}


@dataclass
class Histories:
    """Makes them, on one database and one storage."""

    database: Database
    directory: Path
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.storage = LocalStorage(self.directory / "data" / "objects")
        self.storage.directory.mkdir(parents=True, exist_ok=True)

    def store(self, content: str | None = None) -> dict[str, Any]:
        """A stored file; without `content`, one of its own."""
        path = self.directory / "content"
        path.write_text(content or f"content {next(self._numbers):06}", encoding="utf-8")
        return self.storage.put(path)

    def add_version(self, name: str, kind: str, **source: Any) -> DatasetVersion:
        """A version that is ready, of a dataset of its own or of one that is there."""
        with self.database.transaction() as session:
            dataset = create_dataset(session, name=name, kind=kind)
            version, _ = add_version(session, dataset, source=source or {"folder": "/data"}, ingest=False)
            facts = {"num_images": NUM_IMAGES, "num_usable": NUM_IMAGES, "class_names": ["cat", "dog"]}
            finish_version(session, version.id, manifest=self.store() | facts, report={})
            return version

    def start_run(
        self,
        *,
        iterations: int = 1,
        initial: str | None = None,
        recipe: dict[str, Any] | None = None,
        unlabeled: DatasetVersion | None = None,
    ) -> str:
        """An active run on datasets of its own, but for the pool that is given."""
        name = f"data-{next(self._numbers)}"
        labeled = self.add_version(f"{name}-labeled", "labeled")
        unlabeled = unlabeled or self.add_version(f"{name}-unlabeled", "unlabeled")
        overrides = {"labeling": LABELING, "iterations": {"control": True}} | (recipe or {})
        with self.database.transaction() as session:
            run, _ = create_run(
                session,
                name=name,
                recipe=to_dict(build_recipe("digits", overrides)),
                iterations=iterations,
                labeled=labeled,
                unlabeled=unlabeled,
                validation=None,
                test=None,
                initial_generation_id=initial,
            )
            return run.id

    def start_set(self, generation_id: str, version_id: str, *, evaluation: list[str] | None = None) -> str:
        """A pseudo-label set of its own, whose labeling waits."""
        recipe = to_dict(build_recipe("digits", {"labeling": LABELING}))
        with self.database.transaction() as session:
            row = create_set(
                session,
                generation_id=generation_id,
                unlabeled_version_id=version_id,
                num_images=NUM_IMAGES,
                labeling=recipe["labeling"],
                selection=recipe["selection"],
                seed=0,
                capability="cpu",
                runtime=recipe["runtime"],
                evaluation_version_ids=evaluation or [],
            )
            return row.id

    def start_prediction(self, generation_id: str, version_id: str) -> str:
        """A batch prediction that waits."""
        with self.database.transaction() as session:
            given = {"generation_id": generation_id, "version_id": version_id, "runtime": {}}
            [job] = jobs.enqueue(session, [jobs.NewJob(kind="predict", input=given)])
            return job.id

    def work(self, *, most: int = 1000) -> list[str]:
        """Let whatever waits succeed, at most so many jobs, the controller taking turns; their steps or kinds."""
        done: list[str] = []
        advance_all(self.database)
        while len(done) < most and (job := self.claim()) is not None:
            self.finish(job)
            done.append(job.step or job.kind)
            advance_all(self.database)
        return done

    def claim(self, **which: Any) -> Job | None:
        """A job as running."""
        with self.database.transaction() as session:
            return jobs.claim(session, holder="worker", capabilities=["cpu"], lease_seconds=600, **which)

    def finish(self, job: Job) -> None:
        """Let a running job succeed, with files of its own."""
        made, names = self._made_by(job)
        files = {name: self.store() for name in names}
        log = {"attempt-1.log": self.store()}
        with self.database.transaction() as session:
            assert record_success(session, job, made, files, log) is not None

    def fail(self, job: Job) -> None:
        """Let a running job fail for good."""
        error = {"class": "permanent", "code": "broken", "message": "it broke"}
        with self.database.transaction() as session:
            assert jobs.fail(session, job.id, token=job.token, error=error, backoff_seconds=0) is not None

    def _made_by(self, job: Job) -> tuple[dict[str, Any], tuple[str, ...]]:
        if job.kind == "label":
            return {"num_rows": SHARD_SIZE}, ("shard.parquet",)
        if job.kind == "select":
            return {"report": {"num_pool": NUM_IMAGES, "num_unique": 8, "num_rows": 16}}, ("selected.parquet", "items.parquet")
        if job.kind == "predict":
            return {"num_rows": NUM_IMAGES}, ("predictions.parquet",)
        role = job.input.get("role", "imported")
        metrics = {"role": role, "architecture": "test_resnet", "num_parameters": 10, "validation": {"top1": 0.5}}
        return {"metrics": metrics, "class_names": ["cat", "dog"], "lineage": {}}, ("model.safetensors", "model.onnx")

    def make_run(self, **values: Any) -> str:
        """A run that is completed."""
        run_id = self.start_run(**values)
        self.work()
        return run_id

    def make_import(self) -> str:
        """A generation that was imported."""
        generation_id = new_id("generation")
        with self.database.transaction() as session:
            wanted = jobs.NewJob(kind="import", input={"folder": "/data", "name": "mine"}, generation_id=generation_id)
            [job] = jobs.enqueue(session, [wanted])
        claimed = self.claim(job_id=job.id)
        assert claimed is not None
        self.finish(claimed)
        return generation_id

    def promote(self, generation_id: str, *, alias: str = "production") -> None:
        """Point the alias at the generation."""
        with self.database.transaction() as session:
            row = session.get(Alias, alias)
            version = None if row is None else row.version
            move_alias(session, alias, generation_id, expected_version=version, action="promote", actor=None)

    def ids(self, table: type[Any], *where: Any) -> list[str]:
        """Ids of rows, oldest first."""
        with self.database.reading() as session:
            return list(session.scalars(sa.select(table.id).where(*where).order_by(table.id)))

    def students(self, run_id: str) -> list[str]:
        """The run's generations without its controls, first teacher first."""
        with self.database.reading() as session:
            query = sa.select(Iteration.generation_id).where(Iteration.run_id == run_id).order_by(Iteration.number)
            return [found for found in session.scalars(query) if found is not None]

    def count(self, table: type[Any], *where: Any) -> int:
        """Number of rows."""
        with self.database.reading() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(table).where(*where)) or 0

    def names(self) -> set[tuple[str, str]]:
        """(owner, name) of every file that a row names."""
        with self.database.reading() as session:
            return {(owner, name) for owner, name in session.execute(sa.select(StoredFile.owner_id, StoredFile.name))}

    def age(self, *, days: float) -> None:
        """Let everything that there is have happened so many days earlier, and every stored file be as old."""
        back = timedelta(days=days)
        columns = (
            *(Job.created_at, Job.started_at, Job.finished_at),
            *(Iteration.finished_at, PseudoLabelSet.finished_at, Generation.created_at),
            *(IdempotencyRecord.created_at, Worker.seen_at, Worker.started_at),
        )
        with self.database.transaction() as session:
            for column in columns:
                table = column.class_
                for row in session.scalars(sa.select(table).where(column.is_not(None))):
                    setattr(row, column.key, getattr(row, column.key) - back)
        for path in self.storage.directory.glob("??/*"):
            moment = path.stat().st_mtime - back.total_seconds()
            os.utime(path, (moment, moment))

    def stored(self) -> set[str]:
        """Digests of the files that lie in storage."""
        return {path.name for path in self.storage.directory.glob("??/*")}
