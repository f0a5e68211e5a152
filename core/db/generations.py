"""Generations: registered complete, referred to by runs, sets, aliases and each other."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.files import forget_files, name_files
from core.db.session import now
from core.db.tables import Alias, Generation, Iteration, Job, Promotion, PseudoLabelSet, Run
from core.errors import NotReady, StillReferenced
from core.ids import absent


def register_generation(session: Session, job: Job, result: dict[str, Any]) -> Generation:
    """Insert the generation that a train or import job made, in the transaction that makes the job succeed.

    `result`: files (name → {digest, num_bytes}), metrics, class_names, lineage.
    """
    metrics = result["metrics"]
    generation = Generation(
        id=job.generation_id,
        role=metrics["role"],
        name=job.input.get("name"),
        run_id=job.run_id,
        iteration=job.iteration,
        job_id=job.id,
        teacher_generation_id=job.input.get("teacher_generation_id"),
        pseudo_label_set_id=job.input.get("pseudo_label_set_id"),
        architecture=metrics["architecture"],
        num_parameters=metrics["num_parameters"],
        class_names=result["class_names"],
        digest=result["files"]["model.safetensors"]["digest"],
        metrics=metrics,
        lineage=result.get("lineage", {}),
        created_at=now(session),
    )
    session.add(generation)
    session.flush()
    name_files(session, generation.id, result["files"])
    return generation


def get_generation(session: Session, generation_id: str) -> Generation:
    """NotReady while a job is still making it; NotFound when there is and will be none."""
    generation = session.get(Generation, generation_id)
    if generation is not None:
        return generation
    job = session.scalar(sa.select(Job).where(Job.generation_id == generation_id))
    if job is not None:
        raise NotReady(f"generation {generation_id} is not there yet: its job {job.id} is {job.status}", job_id=job.id, status=job.status)
    raise absent("generation", generation_id)


def list_referrers(session: Session, generation_id: str) -> list[str]:
    """Every row that needs this generation, as `kind id`."""
    referrers = [f"alias {name}" for name in session.scalars(sa.select(Alias.name).where(Alias.generation_id == generation_id))]
    moved = session.scalars(sa.select(Promotion.alias).where(Promotion.generation_id == generation_id).distinct())
    referrers += [f"history of alias {alias}" for alias in moved]
    made = sa.select(Generation.id).where(Generation.teacher_generation_id == generation_id)
    referrers += [f"generation {row}" for row in session.scalars(made)]
    labeled = sa.or_(PseudoLabelSet.generation_id == generation_id, PseudoLabelSet.selection_generation_id == generation_id)
    referrers += [f"pseudo-label set {row}" for row in session.scalars(sa.select(PseudoLabelSet.id).where(labeled))]
    of_run = sa.or_(
        Iteration.generation_id == generation_id,
        Iteration.teacher_generation_id == generation_id,
        Iteration.control_generation_id == generation_id,
    )
    # Recipes and plans name generations too: as initial weights, and as the one that selects.
    open_run = Run.status.in_(("active", "paused"))
    named = sa.cast(Run.recipe, sa.Text).contains(generation_id, autoescape=True)
    planned = sa.cast(Iteration.plan, sa.Text).contains(generation_id, autoescape=True)
    runs = sa.union(
        sa.select(Iteration.run_id).where(of_run),
        sa.select(Run.id).where(sa.or_(Run.initial_generation_id == generation_id, sa.and_(open_run, named))),
        sa.select(Iteration.run_id).join(Run, Run.id == Iteration.run_id).where(open_run, planned),
    )
    referrers += [f"run {row}" for row in session.scalars(runs)]
    active = sa.select(Job.id).where(Job.status.in_(("queued", "running")), sa.cast(Job.input, sa.Text).contains(generation_id))
    referrers += [f"job {row}" for row in session.scalars(active)]
    return referrers


def delete_generation(session: Session, generation_id: str) -> None:
    """Remove a generation that nothing refers to; StillReferenced lists what does."""
    generation = get_generation(session, generation_id)
    referrers = list_referrers(session, generation_id)
    if referrers:
        raise StillReferenced(f"generation {generation_id} is needed by {', '.join(referrers[:5])}", referrers=referrers)
    # Its job keeps its event history, so the job no longer claims to have a generation.
    session.execute(sa.update(Job).where(Job.id == generation.job_id).values(generation_id=None))
    forget_files(session, generation_id)
    session.delete(generation)
