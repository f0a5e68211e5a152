"""The runner's own judgment at the end: what was accepted is there, has ended as it should, and has one effect."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.orm import Session

from cli.verify import find_defects
from core.db.events import order_events
from core.db.tables import (
    Dataset,
    DatasetVersion,
    Event,
    Generation,
    IdempotencyRecord,
    Job,
    Promotion,
    PseudoLabelSet,
    Run,
    StoredFile,
)
from tests.faults.ledger import Accepted, Ledger
from tests.faults.stage import Stage

Found = Iterator[str]


@dataclass(slots=True)
class Verdict:
    """Empty lists are good."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.broken)


def judge(stage: Stage, ledger: Ledger, *, known_jobs: set[str]) -> Verdict:
    """Over the rows and files of a service that has stopped. `known_jobs` are those that the stage itself made."""
    verdict = Verdict(broken=list(ledger.complaints))
    with stage.database.reading() as session:
        verdict.lost += [problem for one in ledger.accepted for problem in _lost(session, one)]
        verdict.doubled += _strangers(session, ledger, known_jobs)
        verdict.doubled += _versions(session, ledger)
        verdict.doubled += _keys(session, ledger)
        verdict.doubled += _repeated_events(session)
        verdict.doubled += _generations(session)
        verdict.doubled += _labels(session, stage)
        verdict.lost += _moves(session, ledger)
    verdict.lost += _untold(stage)
    defects = find_defects(stage.database, stage.storage, orphan_seconds=stage.settings.orphan_grace_seconds)
    verdict.broken += [f"{one.check}: {one.subject} {one.message}" for one in defects]
    return verdict


def _lost(session: Session, one: Accepted) -> Found:
    """It is there, it has ended, and its end is the one that was asked for."""
    table: Any = {"set": PseudoLabelSet, "run": Run}.get(one.noun, Job)
    row = session.get(table, one.id)
    if row is None:
        yield f"{one.noun} {one.id} was accepted and is not there"
        return
    good = {"set": ("ready",), "run": ("completed",)}.get(one.noun, ("succeeded",))
    allowed = good + (("canceled",) if one.cancel_asked else ()) + (("failed",) if one.may_fail else ())
    if row.status not in allowed:
        yield f"{one.noun} {one.id} ended as {row.status}: {json.dumps(getattr(row, 'error', None))}"
    elif row.status == "failed" and (row.error or {}).get("code") != one.may_fail:
        yield f"{one.noun} {one.id} failed for another reason than {one.may_fail}: {json.dumps(row.error)}"


def _strangers(session: Session, ledger: Ledger, known_jobs: set[str]) -> Found:
    """Whatever is there was asked for, and by a request that was answered."""
    accepted = {one.id for one in ledger.accepted}
    if len(accepted) != len(ledger.accepted):
        yield "two requests were answered with one id"
    alone = sa.select(Job.id, Job.kind).where(Job.run_id.is_(None), Job.pseudo_label_set_id.is_(None))
    yield from (
        f"job {job_id} ({kind}) is there, but nobody asked for it"
        for job_id, kind in session.execute(alone)
        if job_id not in accepted | known_jobs
    )
    sets = session.scalars(sa.select(PseudoLabelSet.id).where(PseudoLabelSet.run_id.is_(None)))
    for row_id in [*sets, *session.scalars(sa.select(Run.id))]:
        if row_id not in accepted:
            yield f"{row_id} is there, but nobody asked for it"


def _versions(session: Session, ledger: Ledger) -> Found:
    """As many versions of each dataset as were asked for, each filled by a job of its own."""
    query = sa.select(Dataset.name, sa.func.count(DatasetVersion.id)).join(DatasetVersion, DatasetVersion.dataset_id == Dataset.id)
    there = dict(session.execute(query.group_by(Dataset.name)).all())
    for name in there.keys() | ledger.versions_wanted.keys():
        if there.get(name, 0) != ledger.versions_wanted.get(name, 0):
            yield f"dataset {name} has {there.get(name, 0)} versions, {ledger.versions_wanted.get(name, 0)} were asked for"
    for version, status in session.execute(sa.select(DatasetVersion, Job.status).join(Job, Job.id == DatasetVersion.job_id)):
        if (version.status == "ready") != (status == "succeeded"):
            yield f"version {version.id} is {version.status}, its job {version.job_id} {status}"


def _keys(session: Session, ledger: Ledger) -> Found:
    """One record a key, that of the answer that was given."""
    answers = {one.key: one.id for one in ledger.accepted}
    records = {record.key: record.body.get("id") for record in session.scalars(sa.select(IdempotencyRecord))}
    for key in records.keys() | answers.keys():
        if records.get(key) != answers.get(key):
            yield f"key {key} is remembered with {records.get(key)} and was answered with {answers.get(key)}"


def _repeated_events(session: Session) -> Found:
    """No measurement of one attempt stands in its stream twice."""
    told: Counter[tuple[str, int, str, str]] = Counter()
    query = sa.select(Event.job_id, Event.attempt, Event.kind, Event.data).where(Event.kind.in_(("metric", "checkpoint")))
    for job_id, attempt, kind, data in session.execute(query):
        told[job_id, attempt, kind, json.dumps(data, sort_keys=True)] += 1
    for (job_id, attempt, kind, data), count in told.items():
        if count > 1:
            yield f"attempt {attempt} of job {job_id} has {count} times the {kind} {data[:200]}"


def _untold(stage: Stage) -> Found:
    """Whoever reads a run's events to their end reads all that happened in it."""
    with stage.database.reading() as session:
        runs = list(session.scalars(sa.select(Run.id)))
    order_events(stage.database, runs)
    with stage.database.reading() as session:
        for event in session.scalars(sa.select(Event).where(Event.run_id.is_not(None), Event.run_number.is_(None))):
            yield f"event {event.number} of job {event.job_id} ({event.kind}) is not told in run {event.run_id}"


def _generations(session: Session) -> Found:
    """Exactly one a training that succeeded."""
    made = Counter(session.scalars(sa.select(Generation.job_id)))
    for job in session.scalars(sa.select(Job).where(Job.kind.in_(("train", "import")), Job.status == "succeeded")):
        if made[job.id] != 1:
            yield f"job {job.id} made {made[job.id]} generations"


def _labels(session: Session, stage: Stage) -> Found:
    """Every image of a set's pool has one row in one of its shards."""
    for row in session.scalars(sa.select(PseudoLabelSet).where(PseudoLabelSet.status == "ready")):
        shards = sa.select(StoredFile.digest).join(Job, Job.id == StoredFile.owner_id)
        shards = shards.where(Job.pseudo_label_set_id == row.id, Job.kind == "label", StoredFile.name == "shard.parquet")
        keys: Counter[str] = Counter()
        for digest in session.scalars(shards):
            keys.update(pq.read_table(stage.storage.fetch(digest), columns=["key"]).column("key").to_pylist())
        if len(keys) != row.num_images or set(keys.values()) - {1}:
            twice = sum(count > 1 for count in keys.values())
            yield f"set {row.id} labels {len(keys)} of {row.num_images} images, {twice} of them more than once"


def _moves(session: Session, ledger: Ledger) -> Found:
    """Every promotion that was answered with 200 stands in the history."""
    history = {move.version: move.generation_id for move in session.scalars(sa.select(Promotion))}
    for move in ledger.moves:
        if history.get(move.version) != move.generation_id:
            found = history.get(move.version)
            yield f"the promotion of {move.generation_id} as version {move.version} was answered, the history has {found}"
