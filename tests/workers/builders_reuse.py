"""Generations, pools and pseudo-label sets as rows and stored files, for labels that are taken over."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version, get_dataset
from core.db.pseudo_labels import create_set
from core.db.session import Database
from core.db.tables import Dataset, Job, StoredFile
from core.ids import new_id
from core.storage import LocalStorage
from ml.config import LabelingConfig, SelectionConfig
from ml.validation import to_dict
from tests.ml.builders_generations import RUNTIME
from workers.outcomes import record_success

_numbers = itertools.count()
LABELING = to_dict(LabelingConfig(shard_size=4, batch_size=4))
SELECTION = to_dict(SelectionConfig(min_confidence=0.0, require_every_class=False, cap_per_class="none"))


def new_number() -> int:
    """One that was not given before."""
    return next(_numbers)


def store(storage: LocalStorage, path: Path, content: str | None = None) -> dict[str, Any]:
    """Keep a file, with this content if it is given."""
    if content is not None:
        path.write_text(content, encoding="utf-8")
    return storage.put(path)


def add_generation(database: Database, files: dict[str, dict[str, Any]], class_names: list[str]) -> str:
    """An imported generation with these stored files."""
    generation_id = new_id("generation")
    with database.transaction() as session:
        wanted = jobs.NewJob(kind="import", input={"folder": "/data", "name": "mine"}, generation_id=generation_id)
        [job] = jobs.enqueue(session, [wanted])
    with database.transaction() as session:
        claimed = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60, job_id=job.id)
        assert claimed is not None
        metrics = {"role": "imported", "architecture": "test_resnet", "num_parameters": 1}
        record_success(session, claimed, {"metrics": metrics, "class_names": class_names, "lineage": {}}, files, {})
    return generation_id


def add_pool(database: Database, manifest: dict[str, Any], num_images: int, *, name: str) -> str:
    """A version of an unlabeled dataset, new or not."""
    with database.transaction() as session:
        known = session.scalar(sa.select(Dataset.id).where(Dataset.name == name))
        dataset = get_dataset(session, name) if known else create_dataset(session, name=name, kind="unlabeled")
        version, _ = add_version(session, dataset, source={"folder": "/data"}, ingest=False)
        facts = {"num_images": num_images, "num_usable": num_images, "class_names": []}
        finish_version(session, version.id, manifest=manifest | facts, report={})
        return version.id


def start_set(database: Database, generation_id: str, version_id: str, *, num_images: int = 8, **values: Any) -> str:
    """A set of its own whose shards wait; its id."""
    given: dict[str, Any] = {"labeling": LABELING, "runtime": to_dict(RUNTIME)} | values
    with database.transaction() as session:
        row = create_set(
            session,
            generation_id=generation_id,
            unlabeled_version_id=version_id,
            num_images=num_images,
            selection=SELECTION,
            seed=0,
            capability="cpu",
            evaluation_version_ids=[],
            **given,
        )
        return row.id


def shards_of(database: Database, set_id: str) -> list[Job]:
    """The set's labeling jobs in the order of their images."""
    with database.reading() as session:
        query = sa.select(Job).where(Job.pseudo_label_set_id == set_id, Job.kind == "label").order_by(Job.id)
        return list(session.scalars(query))


def digest_of(database: Database, job: Job) -> str:
    """Of the shard that the job labeled or took over."""
    with database.reading() as session:
        return session.get_one(StoredFile, (job.id, "shard.parquet")).digest
