"""Pseudo-label sets: one labeling job a shard, then one selection job.

A set of many shards is written down a slice at a time, in transactions that nobody waits long for. Its last labeling job is written
first and held until all others are there: so nobody, not even an older version, takes the shards that are written for all shards.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.cancellation import hold_open_jobs, request_cancel_all
from core.db.datasets import hold_version
from core.db.files import name_files
from core.db.generations import hold_generations
from core.db.jobs import SLICE, NewJob, enqueue, enqueue_many
from core.db.session import now
from core.db.tables import Job, PseudoLabelSet, Run, StoredFile
from core.errors import WrongState
from core.ids import absent, new_id

HELD_UNTIL = datetime(9000, 1, 1, tzinfo=UTC)
"""`not_before` of a labeling job that waits for the others of its set to be written."""


def create_set(
    session: Session,
    *,
    generation_id: str,
    unlabeled_version_id: str,
    num_images: int,
    labeling: dict[str, Any],
    selection: dict[str, Any],
    seed: int,
    capability: str,
    runtime: dict[str, Any],
    evaluation_version_ids: list[str],
    run_id: str | None = None,
    iteration: int | None = None,
    selection_generation_id: str | None = None,
    keep_keys_of_set_id: str | None = None,
    priority: int = 0,
    reuse: bool = True,
) -> PseudoLabelSet:
    """Insert the set and a labeling job for each shard (twice as many with a separate selection model).

    Of more than a slice, the first ones and the last; `write_next_jobs` adds the rest. `reuse` off: every shard is labeled, also where
    the same labels were made before.
    """
    for version_id in sorted({unlabeled_version_id, *evaluation_version_ids}):
        hold_version(session, version_id)
    hold_generations(session, [one for one in (generation_id, selection_generation_id) if one is not None])
    row = PseudoLabelSet(
        id=new_id("pseudo_label_set"),
        status="labeling",
        run_id=run_id,
        iteration=iteration,
        generation_id=generation_id,
        selection_generation_id=selection_generation_id,
        unlabeled_version_id=unlabeled_version_id,
        labeling=labeling,
        selection=selection | {"evaluation_version_ids": evaluation_version_ids, "keep_keys_of_set_id": keep_keys_of_set_id},
        seed=seed,
        num_shards=len(range(0, num_images, labeling["shard_size"])),
        num_images=num_images,
        priority=priority,
        created_at=now(session),
    )
    session.add(row)
    session.flush()
    num_jobs = _count_jobs(row)
    if num_jobs > SLICE:
        [held] = enqueue(session, [_labeling_job(row, num_jobs - 1, runtime=runtime, capability=capability, reuse=reuse)])
        held.not_before, row.held_job_id = HELD_UNTIL, held.id
        session.flush()
    first = range(min(num_jobs, SLICE))
    enqueue_many(session, [_labeling_job(row, place, runtime=runtime, capability=capability, reuse=reuse) for place in first])
    return row


def _count_jobs(row: PseudoLabelSet) -> int:
    return row.num_shards * (1 if row.selection_generation_id is None else 2)


def _labeling_job(row: PseudoLabelSet, place: int, *, runtime: dict[str, Any], capability: str, reuse: bool) -> NewJob:
    """The labeling job at this place of the set: shard after shard, then all of them again by the selection model."""
    is_first = place < row.num_shards
    start = place % row.num_shards * row.labeling["shard_size"]
    job_input = {
        "generation_id": row.generation_id if is_first else row.selection_generation_id,
        "version_id": row.unlabeled_version_id,
        "start": start,
        "stop": min(start + row.labeling["shard_size"], row.num_images),
        "labeling": row.labeling,
        "runtime": runtime,
        "purpose": "label" if is_first else "select",
        "reuse": reuse,
    }
    return NewJob(
        kind="label",
        input=job_input,
        capability=capability,
        priority=row.priority,
        run_id=row.run_id,
        iteration=row.iteration,
        step="label" if row.run_id else None,
        part=place if row.run_id else None,
        pseudo_label_set_id=row.id,
    )


def list_unwritten_sets(session: Session) -> list[str]:
    """Sets some of whose labeling jobs are still to be written; those of a failed set are, once it is tried again."""
    going_on = sa.or_(
        PseudoLabelSet.run_id.is_(None), PseudoLabelSet.run_id.in_(sa.select(Run.id).where(Run.status.in_(("active", "paused"))))
    )
    unwritten = (PseudoLabelSet.held_job_id.is_not(None), PseudoLabelSet.status == "labeling", going_on)
    return list(session.scalars(sa.select(PseudoLabelSet.id).where(*unwritten).order_by(PseudoLabelSet.id)))


def write_next_jobs(session: Session, set_id: str) -> bool:
    """Insert the next slice of the set's labeling jobs; after the last one the job that was held may start. False when none is missing."""
    held_id = session.scalar(sa.select(PseudoLabelSet.held_job_id).where(PseudoLabelSet.id == set_id))
    # Jobs before their set, as everybody who writes both; and whoever cancels them comes before this or after it.
    held = None if held_id is None else session.get(Job, held_id, with_for_update=True, populate_existing=True)
    row = session.get(PseudoLabelSet, set_id, with_for_update=True, populate_existing=True)
    if row is None or held is None or row.held_job_id is None or row.status != "labeling":
        return False
    written = session.scalar(sa.select(sa.func.count()).where(Job.pseudo_label_set_id == set_id, Job.kind == "label")) or 0
    last = _count_jobs(row) - 1
    next_ones = range(written - 1, min(written - 1 + SLICE, last))
    given: dict[str, Any] = {"runtime": held.input["runtime"], "capability": held.capability, "reuse": held.input["reuse"]}
    enqueue_many(session, [_labeling_job(row, place, **given) for place in next_ones])
    if next_ones.stop == last:
        row.held_job_id = None
        if held.not_before == HELD_UNTIL:
            held.not_before = None
    return row.held_job_id is not None


def enqueue_selection(session: Session, row: PseudoLabelSet) -> Job:
    """All shards are labeled: insert the job that selects, and say so in the set."""
    row.status = "selecting"
    wanted = NewJob(
        kind="select",
        input={"pseudo_label_set_id": row.id},
        priority=row.priority,
        run_id=row.run_id,
        iteration=row.iteration,
        step="select" if row.run_id else None,
        part=0 if row.run_id else None,
        pseudo_label_set_id=row.id,
    )
    [job] = enqueue(session, [wanted])
    return job


def count_shards_done(session: Session, row: PseudoLabelSet) -> int:
    """How many of the set's shards are labeled."""
    if row.status in ("selecting", "ready"):
        return row.num_shards
    # Neither the kind of job nor anything else that only the row itself tells: a count that stays in ix_jobs_set. Until all
    # shards are labeled no other job of the set has succeeded.
    query = sa.select(sa.func.count()).where(Job.pseudo_label_set_id == row.id, Job.status == "succeeded")
    succeeded = session.scalar(query) or 0
    # With a separate selection model each shard has two jobs.
    return succeeded if row.selection_generation_id is None else succeeded // 2


def list_first_jobs(session: Session, set_id: str, *, limit: int) -> list[str]:
    """Ids of the set's first jobs. They all have the set's priority, so those of each status come in order from ix_jobs_set."""
    firsts = [
        sa.select(Job.id)
        .where(Job.pseudo_label_set_id == set_id, Job.status == status)
        .order_by(Job.priority.desc(), Job.id)
        .limit(limit)
        .subquery()
        for status in lifecycle.JOB_STATUSES
    ]
    each = sa.union_all(*(sa.select(first) for first in firsts)).subquery()
    return list(session.scalars(sa.select(each.c.id).order_by(each.c.id).limit(limit)))


def list_shards(session: Session, set_id: str, *, purpose: str) -> list[tuple[str, str | None]]:
    """The set's finished labeling jobs of one purpose (`label` or `select`), in the order of their images: (job, digest of its shard).

    No whole rows: a supervisor that held those of 30 000 shards would need more memory than for everything else.
    """
    digest = sa.select(StoredFile.digest).where(StoredFile.owner_id == Job.id, StoredFile.name == "shard.parquet").scalar_subquery()
    query = sa.select(Job.id, digest).where(
        Job.pseudo_label_set_id == set_id, Job.kind == "label", Job.status == "succeeded", Job.input["purpose"].as_string() == purpose
    )
    return [(job_id, found) for job_id, found in session.execute(query.order_by(Job.input["start"].as_integer()))]


def get_set(session: Session, set_id: str) -> PseudoLabelSet:
    """NotFound when there is none."""
    row = session.get(PseudoLabelSet, set_id, populate_existing=True)
    if row is None:
        raise absent("pseudo-label set", set_id)
    return row


def hold_set(session: Session, set_id: str) -> PseudoLabelSet:
    """The set, held against other writers until the transaction ends; NotFound when it is gone."""
    row = session.get(PseudoLabelSet, set_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise absent("pseudo-label set", set_id)
    return row


def finish_set(session: Session, set_id: str, *, files: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    """Selection succeeded: the set can be read and trained on. `files`: selected.parquet, and items.parquet with every guess.

    One that was canceled meanwhile stays so.
    """
    row = hold_set(session, set_id)
    if row.status == "canceled":
        return
    row.status = "ready"
    row.report = report
    row.finished_at = now(session)
    name_files(session, set_id, files)


def cancel_set(session: Session, set_id: str) -> PseudoLabelSet:
    """Cancel a set of its own with its jobs; twice changes nothing. WrongState for one that has ended, or that belongs to a run."""
    row = get_set(session, set_id)
    if row.run_id is not None:
        raise WrongState(f"pseudo-label set {set_id} belongs to run {row.run_id}; cancel the run")
    # Jobs before their set, as everybody who writes both.
    hold_open_jobs(session, Job.pseudo_label_set_id == set_id)
    row = hold_set(session, set_id)
    if row.status in ("ready", "failed"):
        raise WrongState(
            f"pseudo-label set {set_id} is already {row.status}; only one that is still made can be canceled", status=row.status
        )
    if row.status != "canceled":
        row.status, row.finished_at = "canceled", now(session)
    # Those, too, that the controller inserted while this waited for the set.
    request_cancel_all(session, Job.pseudo_label_set_id == set_id)
    return row
