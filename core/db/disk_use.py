"""How much storage who uses, by sums over the rows that name stored files: a file that several rows name counts once.

Nothing is measured on the disk. A handful of queries, however many files there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from core.db.tables import DatasetVersion, Generation, Job, PseudoLabelSet, Run, StoredFile

Ids = sa.Select[Any] | sa.CompoundSelect[Any]
"""A query for the ids of owners."""

KINDS = ("manifests", "images", "shards", "items", "selections", "generations", "checkpoints", "predictions", "logs", "other")


@dataclass(frozen=True, slots=True)
class Use:
    """Files that somebody needs, each content once."""

    num_files: int
    num_bytes: int
    shared_bytes: int = 0
    """Of contents that others need too: deleting this owner would not free them."""

    @property
    def freed_bytes(self) -> int:
        """What the sweep would remove if this owner were deleted."""
        return self.num_bytes - self.shared_bytes


def owners_of_run(run_id: str) -> Ids:
    """Everything of the run that names files: its jobs, its sets, its generations."""
    return sa.union_all(*(sa.select(table.id).where(table.run_id == run_id) for table in (Job, PseudoLabelSet, Generation)))


def owners_of_set(set_id: str) -> Ids:
    """The set, and the jobs that labeled its shards and selected."""
    return sa.union_all(
        sa.select(PseudoLabelSet.id).where(PseudoLabelSet.id == set_id), sa.select(Job.id).where(Job.pseudo_label_set_id == set_id)
    )


def owners_of_generation(generation_id: str) -> Ids:
    """The generation itself."""
    return sa.select(Generation.id).where(Generation.id == generation_id)


def owners_of_version(version_id: str) -> Ids:
    """The dataset version itself: its manifest, and images that were packed on its behalf."""
    return sa.select(DatasetVersion.id).where(DatasetVersion.id == version_id)


def measure(session: Session, owners: Ids) -> Use:
    """What these owners use together."""
    ids = owners.subquery()
    theirs = sa.select(ids.c[0])
    other = aliased(StoredFile)
    contents = (
        sa.select(StoredFile.digest, sa.func.max(StoredFile.num_bytes).label("num_bytes"))
        .where(StoredFile.owner_id.in_(theirs))
        .group_by(StoredFile.digest)
        .subquery()
    )
    elsewhere = sa.exists().where(other.digest == contents.c.digest, other.owner_id.not_in(theirs))
    total = sa.func.coalesce(sa.func.sum(contents.c.num_bytes), 0)
    shared = sa.func.coalesce(sa.func.sum(contents.c.num_bytes).filter(elsewhere), 0)
    num_files, num_bytes, shared_bytes = session.execute(sa.select(sa.func.count(), total, shared).select_from(contents)).one()
    return Use(num_files, int(num_bytes), int(shared_bytes))


def measure_all(session: Session) -> Use:
    """What all rows together need."""
    contents = sa.select(StoredFile.digest, sa.func.max(StoredFile.num_bytes).label("num_bytes")).group_by(StoredFile.digest).subquery()
    return _sum(session, contents)


def _sum(session: Session, contents: sa.Subquery) -> Use:
    total = sa.func.coalesce(sa.func.sum(contents.c.num_bytes), 0)
    num_files, num_bytes = session.execute(sa.select(sa.func.count(), total).select_from(contents)).one()
    return Use(num_files, int(num_bytes))


def measure_kinds(session: Session, owners: Ids | None = None) -> dict[str, Use]:
    """By what the files are, in the order of KINDS; None: of everybody. A content of two kinds counts in both."""
    kind = kind_of_file().label("kind")
    query = sa.select(kind, StoredFile.digest, sa.func.max(StoredFile.num_bytes).label("num_bytes")).group_by(kind, StoredFile.digest)
    if owners is not None:
        query = query.where(StoredFile.owner_id.in_(sa.select(owners.subquery().c[0])))
    found = _sum_by(session, query.subquery(), "kind")
    return {name: found[name] for name in KINDS if name in found}


def _sum_by(session: Session, contents: sa.Subquery, column: str) -> dict[str, Use]:
    by = contents.c[column]
    query = sa.select(by, sa.func.count(), sa.func.sum(contents.c.num_bytes)).group_by(by)
    return {word: Use(num_files, int(num_bytes)) for word, num_files, num_bytes in session.execute(query)}


def kind_of_file() -> sa.Case[str]:
    """By the file's name and by what its owner's id says it is."""
    owner = sa.func.substr(StoredFile.owner_id, 1, 4)
    return sa.case(
        (owner == "gen_", "generations"),
        (sa.and_(owner == "dsv_", StoredFile.name == "manifest.parquet"), "manifests"),
        (owner == "dsv_", "images"),
        (StoredFile.name == "selected.parquet", "selections"),
        (StoredFile.name == "items.parquet", "items"),
        (StoredFile.name == "shard.parquet", "shards"),
        (StoredFile.name == "predictions.parquet", "predictions"),
        (StoredFile.name.startswith("checkpoint-", autoescape=True), "checkpoints"),
        (StoredFile.name.like("attempt-%.log"), "logs"),
        else_="other",
    )


def measure_generations(session: Session, run_id: str) -> dict[str, Use]:
    """Each generation of the run by its id."""
    query = sa.select(StoredFile.owner_id.label("owner"), StoredFile.digest, StoredFile.num_bytes).distinct()
    return _sum_by(
        session, query.join(Generation, Generation.id == StoredFile.owner_id).where(Generation.run_id == run_id).subquery(), "owner"
    )


def measure_sets(session: Session, run_id: str) -> dict[str, Use]:
    """Each pseudo-label set of the run by its id, with the shards that its jobs labeled."""
    own = sa.select(PseudoLabelSet.id.label("owner"), StoredFile.digest, StoredFile.num_bytes)
    own = own.join(StoredFile, StoredFile.owner_id == PseudoLabelSet.id).where(PseudoLabelSet.run_id == run_id)
    shards = sa.select(Job.pseudo_label_set_id.label("owner"), StoredFile.digest, StoredFile.num_bytes)
    shards = shards.join(StoredFile, StoredFile.owner_id == Job.id).where(Job.run_id == run_id, Job.pseudo_label_set_id.is_not(None))
    return _sum_by(session, sa.union(own, shards).subquery(), "owner")


def measure_runs(session: Session, *, limit: int) -> list[tuple[Run, Use]]:
    """The runs that use most, the largest first."""
    parts = [
        sa.select(table.run_id.label("run"), StoredFile.digest, StoredFile.num_bytes)
        .join(StoredFile, StoredFile.owner_id == table.id)
        .where(table.run_id.is_not(None))
        for table in (Job, PseudoLabelSet, Generation)
    ]
    contents = sa.union(*parts).subquery()
    total = sa.func.sum(contents.c.num_bytes)
    sums = sa.select(contents.c.run, sa.func.count().label("num_files"), total.label("num_bytes")).group_by(contents.c.run).subquery()
    query = sa.select(Run, sums.c.num_files, sums.c.num_bytes).join(sums, sums.c.run == Run.id)
    found = session.execute(query.order_by(sums.c.num_bytes.desc(), Run.id).limit(limit))
    return [(run, Use(num_files, int(num_bytes))) for run, num_files, num_bytes in found]
