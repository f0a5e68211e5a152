"""What must have come of a simulation, known from its seed alone, against its rows and what its workers counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import sqlalchemy as sa

from bench.simulation.fates import count_fates, fates_of
from bench.simulation.plan import Notes
from bench.simulation.scene import Scene
from cli.verify import find_defects
from core.db.events import order_events
from core.db.tables import Event, Generation, Job, OutboxMessage, StoredFile
from core.storage import make_storage

NEVER = ("lost without a reason", "late results taken", "repeated results taken")
"""Counts of workers that stay 0."""


def list_jobs(shards: int) -> list[tuple[str, int]]:
    """(step, part) of every job of the run."""
    return [("train-teacher", 0), *(("label", part) for part in range(shards)), ("select", 0), ("train-student", 0)]


def find_faults(scene: Scene, notes: Notes) -> list[str]:
    """Everything that is not as it must be; none in a sound service."""
    settings = scene.shared.settings
    defects = find_defects(scene.database, make_storage(settings), orphan_seconds=settings.orphan_grace_seconds)
    wrong = [f"{defect.check}: {defect.subject} {defect.message}" for defect in defects]
    return [*notes.errors, *wrong, *_wrong_counts(scene, notes), *_wrong_rows(scene)]


def _wrong_counts(scene: Scene, notes: Notes) -> Iterator[str]:
    plan = scene.shared.plan
    fates = count_fates(plan.seed, list_jobs(plan.shards))
    fenced = {"late results fenced": fates["freezes"], "repeated results fenced": fates["repeats"]}
    expected = dict(fates) | fenced | dict.fromkeys(NEVER, 0)
    for what, number in expected.items():
        if notes.counts[what] != number:
            yield f"{what}: {notes.counts[what]}, but the seed says {number}"


def _untold(scene: Scene) -> Iterator[str]:
    """Whoever reads the run's events to their end reads all that happened in it."""
    order_events(scene.database, [scene.run_id])
    with scene.database.reading() as session:
        untold = sa.select(sa.func.count()).where(Event.run_id == scene.run_id, Event.run_number.is_(None))
        if num_untold := session.scalar(untold):
            yield f"{num_untold} events are not told in the run"


def _wrong_rows(scene: Scene) -> Iterator[str]:
    plan = scene.shared.plan
    with scene.database.reading() as session:
        rows = {(job.step or "", job.part or 0): job for job in session.scalars(sa.select(Job).where(Job.run_id == scene.run_id))}
        successes = Counter(session.scalars(sa.select(Event.job_id).where(Event.kind == "succeeded")))
        losses = Counter(session.scalars(sa.select(Event.job_id).where(Event.kind == "retrying")))
        files = Counter(session.scalars(sa.select(StoredFile.name)))
        generations = session.scalar(sa.select(sa.func.count()).select_from(Generation))
        unpublished = session.scalar(sa.select(sa.func.count()).select_from(OutboxMessage).where(OutboxMessage.published_at.is_(None)))
    yield from _untold(scene)
    jobs = list_jobs(plan.shards)
    for job in set(jobs) ^ rows.keys():
        yield f"job {job} is {'missing' if job in set(jobs) else 'one that nobody expects'}"
    for step, part in jobs:
        if (row := rows.get((step, part))) is None:
            continue
        attempts = len(fates_of(plan.seed, step, part))
        found = (row.status, row.attempt, row.token, row.lost_attempts, successes[row.id], losses[row.id])
        wanted = ("succeeded", attempts, attempts, attempts - 1, 1, attempts - 1)
        if found != wanted:
            yield f"{step} {part}: (status, attempts, token, lost, successes, retries) is {found}, but the seed says {wanted}"
    if files["shard.parquet"] != plan.shards or generations != 2 or unpublished:
        yield f"{files['shard.parquet']} shard files, {generations} generations, {unpublished} hints that nobody published"
