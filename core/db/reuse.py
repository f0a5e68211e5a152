"""Labels that were made before: which labeling jobs make the same bytes, and whose stored file has them.

What it finds is only a saving. Whoever takes a file over reads and compares it first, and labels when anything is amiss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.tables import DatasetVersion, Job, StoredFile
from core.version import LABELS

SHARD = "shard.parquet"
_NETWORK = ("model.safetensors", "config.json", "preprocessing.json", "class_names.json")
_LABELING = ("stored_probabilities", "batch_size", "calibrate")
_RUNTIME = ("device", "precision", "num_threads")
_CANDIDATES = 3


class Labeled(NamedTuple):
    """A shard that was labeled before."""

    job_id: str
    result: dict[str, Any]
    digest: str


class ShardKeys(NamedTuple):
    """What a shard's bytes depend on, as two digests."""

    exact: str
    """Of all of it: jobs with the same one make the same bytes."""
    of_dataset: str
    """With the dataset in place of the images: where a new version of a pool begins with the same ones, the same bytes; its rows tell."""


def shard_keys(session: Session, job_input: Mapping[str, Any], *, runtime: Mapping[str, Any], host: Mapping[str, Any]) -> ShardKeys | None:
    """Digests of everything that the bytes of a labeled shard depend on; None when the rows do not tell all of it.

    The images count by the manifest's digest and the shard's rows, the network by the digests of its files, whatever their versions and
    generations are called. `runtime` is resolved; `host` names the processor and the libraries.
    """
    version = session.get(DatasetVersion, job_input["version_id"])
    names = (*_NETWORK, "calibration.json") if job_input["labeling"]["calibrate"] else _NETWORK
    files = sa.select(StoredFile.name, StoredFile.digest).where(
        StoredFile.owner_id == job_input["generation_id"], StoredFile.name.in_(names)
    )
    network = dict(session.execute(files).all())
    if version is None or version.manifest_digest is None or "model.safetensors" not in network:
        return None
    facts = {
        "labels": LABELS,
        "rows": [job_input["start"], job_input["stop"]],
        "network": network,
        "labeling": {name: job_input["labeling"][name] for name in _LABELING} | _views_of(job_input["labeling"]),
        "runtime": {name: runtime[name] for name in _RUNTIME},
        "host": dict(host),
    }
    return ShardKeys(_digest(facts | {"manifest": version.manifest_digest}), _digest(facts | {"dataset": version.dataset_id}))


def _views_of(labeling: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing for the one plain view that there was before there were others."""
    views = labeling.get("views") or {}
    is_plain = not views.get("flip") and list(views.get("zooms", [1.0])) == [1.0]
    return {} if is_plain else {"views": views}


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remember_shard(session: Session, job_id: str, keys: ShardKeys | None) -> None:
    """The job's shard may be taken over by jobs with the same keys."""
    exact, of_dataset = keys or (None, None)
    query = sa.update(Job).where(Job.id == job_id).values(reuse_key=exact, reuse_dataset_key=of_dataset)
    session.execute(query, execution_options={"synchronize_session": False})


def list_same_shards(session: Session, keys: ShardKeys) -> list[Labeled]:
    """A few shards that were labeled with the exact key and still have their file, newest first, each content once."""
    return _list_shards(session, Job.reuse_key == keys.exact)


def list_similar_shards(session: Session, keys: ShardKeys) -> list[Labeled]:
    """Likewise those of any version of the dataset: whoever takes one over compares its rows."""
    return _list_shards(session, Job.reuse_dataset_key == keys.of_dataset)


def _list_shards(session: Session, where: sa.ColumnElement[bool]) -> list[Labeled]:
    query = (
        sa.select(Job.id, Job.result, StoredFile.digest)
        .join(StoredFile, sa.and_(StoredFile.owner_id == Job.id, StoredFile.name == SHARD))
        .where(where, Job.status == "succeeded")
        .order_by(Job.id.desc())
        .limit(10 * _CANDIDATES)
    )
    found = {digest: Labeled(job_id, result or {}, digest) for job_id, result, digest in session.execute(query).all()[::-1]}
    return list(found.values())[::-1][:_CANDIDATES]
