"""Pseudo-label sets: one labeling job a shard, then one selection job."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.files import name_files
from core.db.jobs import NewJob, enqueue, enqueue_many, request_cancel
from core.db.session import now
from core.db.tables import Job, PseudoLabelSet, StoredFile
from core.errors import WrongState
from core.ids import absent, new_id


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
) -> tuple[PseudoLabelSet, list[NewJob]]:
    """Insert the set and a labeling job for each shard (twice as many with a separate selection model).

    `reuse` off: every shard is labeled, also where the same labels were made before.
    """
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
    wanted = _labeling_jobs(row, runtime=runtime, capability=capability, reuse=reuse)
    enqueue_many(session, wanted)
    return row, wanted


def _labeling_jobs(row: PseudoLabelSet, *, runtime: dict[str, Any], capability: str, reuse: bool) -> list[NewJob]:
    shard_size = row.labeling["shard_size"]
    wanted: list[NewJob] = []
    for purpose, labeler in (("label", row.generation_id), ("select", row.selection_generation_id)):
        if labeler is None:
            continue
        for start in range(0, row.num_images, shard_size):
            job_input = {
                "generation_id": labeler,
                "version_id": row.unlabeled_version_id,
                "start": start,
                "stop": min(start + shard_size, row.num_images),
                "labeling": row.labeling,
                "runtime": runtime,
                "purpose": purpose,
                "reuse": reuse,
            }
            wanted.append(
                NewJob(
                    kind="label",
                    input=job_input,
                    capability=capability,
                    priority=row.priority,
                    run_id=row.run_id,
                    iteration=row.iteration,
                    step="label" if row.run_id else None,
                    part=len(wanted) if row.run_id else None,
                    pseudo_label_set_id=row.id,
                )
            )
    return wanted


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


def finish_set(session: Session, set_id: str, *, files: dict[str, dict[str, Any]], report: dict[str, Any]) -> None:
    """Selection succeeded: the set can be read and trained on. `files`: selected.parquet, and items.parquet with every guess.

    One that was canceled meanwhile stays so.
    """
    row = session.get_one(PseudoLabelSet, set_id, with_for_update=True, populate_existing=True)
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
    still_open = sa.select(Job.id).where(Job.pseudo_label_set_id == set_id, Job.status.in_(("queued", "running"))).order_by(Job.id)
    jobs = list(session.scalars(still_open.with_for_update()))
    row = session.get_one(PseudoLabelSet, set_id, with_for_update=True, populate_existing=True)
    if row.status in ("ready", "failed"):
        raise WrongState(
            f"pseudo-label set {set_id} is already {row.status}; only one that is still made can be canceled", status=row.status
        )
    if row.status != "canceled":
        row.status, row.finished_at = "canceled", now(session)
    # The controller may have inserted the job that selects while this waited for the set.
    for job_id in dict.fromkeys([*jobs, *session.scalars(still_open)]):
        request_cancel(session, job_id)
    return row
