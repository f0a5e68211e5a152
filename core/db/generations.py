"""Generations: registered complete, referred to by runs, sets, aliases and each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.files import forget_files, name_files
from core.db.session import now
from core.db.tables import Alias, Generation, Iteration, Job, Promotion, PseudoLabelSet, Run
from core.errors import NotReady, StillReferenced
from core.ids import absent

_ID = re.compile(r"gen_\w+")
_REFERENCE = "generation:"
_REFERRING = ("initial_weights", "selection_model")
"""Fields of a recipe or a plan that may name a generation; elsewhere, as in a recipe's name, the same letters mean nothing."""


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


def hold_generation(session: Session, generation_id: str) -> None:
    """Keep a generation from being deleted until the transaction ends that begins to need it; NotFound when it is gone."""
    held = sa.select(Generation.id).where(Generation.id == generation_id).with_for_update(read=True, key_share=True)
    if session.scalar(held) is None:
        raise absent("generation", generation_id)


def hold_generations(session: Session, generation_ids: Collection[str]) -> None:
    """The same for several, in the order in which a run's are deleted: whoever needs more than one names them all at once."""
    for generation_id in sorted(set(generation_ids)):
        hold_generation(session, generation_id)


def named_generations(config: Any) -> Iterator[str]:
    """The generations that a recipe or a plan names, as `generation:ID`: as initial weights, and as the one that selects."""
    if isinstance(config, list | tuple):
        for part in config:
            yield from named_generations(part)
    elif isinstance(config, dict):
        for field, value in config.items():
            if field in _REFERRING and isinstance(value, str) and value.startswith(_REFERENCE):
                yield value.removeprefix(_REFERENCE)
            else:
                yield from named_generations(value)


def list_referrers(session: Session, generation_id: str) -> list[str]:
    """Every row that needs this generation, as `kind id`."""
    return list_referrers_of(session, sa.select(Generation.id).where(Generation.id == generation_id))


def list_referrers_of(session: Session, generations: sa.Select[str], *, outside_run: str | None = None) -> list[str]:
    """Every row that needs one of the generations whose ids the query gives, as `kind id`; rows of `outside_run` do not count."""

    def elsewhere(run_id: Any) -> sa.ColumnElement[bool]:
        return sa.true() if outside_run is None else run_id.is_distinct_from(outside_run)

    referrers = [f"alias {name}" for name in session.scalars(sa.select(Alias.name).where(Alias.generation_id.in_(generations)))]
    moved = session.scalars(sa.select(Promotion.alias).where(Promotion.generation_id.in_(generations)).distinct())
    referrers += [f"history of alias {alias}" for alias in moved]
    made = sa.select(Generation.id).where(Generation.teacher_generation_id.in_(generations), elsewhere(Generation.run_id))
    referrers += [f"generation {row}" for row in session.scalars(made)]
    labeled = sa.or_(PseudoLabelSet.generation_id.in_(generations), PseudoLabelSet.selection_generation_id.in_(generations))
    sets = sa.select(PseudoLabelSet.id).where(labeled, elsewhere(PseudoLabelSet.run_id))
    referrers += [f"pseudo-label set {row}" for row in session.scalars(sets)]
    of_run = sa.or_(
        Iteration.generation_id.in_(generations),
        Iteration.teacher_generation_id.in_(generations),
        Iteration.control_generation_id.in_(generations),
    )
    runs = sa.union(
        sa.select(Iteration.run_id).where(of_run, elsewhere(Iteration.run_id)),
        sa.select(Run.id).where(Run.initial_generation_id.in_(generations), elsewhere(Run.id)),
    )
    ids = set(session.scalars(generations))
    found = set(session.scalars(runs)) | _runs_that_write(session, ids, elsewhere)
    referrers += [f"run {row}" for row in sorted(found)]
    # Labeling jobs name what their sets name, trainings what their runs do.
    open_jobs = Job.status.in_(("queued", "running")), Job.kind.not_in(("label", "train")), elsewhere(Job.run_id)
    jobs = _naming(session, sa.select(Job.id, sa.cast(Job.input, sa.Text)).where(*open_jobs), ids)
    return referrers + [f"job {row}" for row in sorted(jobs)]


def _runs_that_write(session: Session, ids: set[str], elsewhere: Callable[[Any], sa.ColumnElement[bool]]) -> set[str]:
    """Recipes and plans name generations too: as initial weights, and as the one that selects."""
    # A failed run may be retried, and reads its recipe again then.
    open_run = Run.status.in_(("active", "paused", "failed"))
    recipes = sa.select(Run.id, sa.cast(Run.recipe, sa.Text)).where(open_run, elsewhere(Run.id))
    plans = sa.select(Iteration.run_id, sa.cast(Iteration.plan, sa.Text)).join(Run, Run.id == Iteration.run_id)
    return _naming(session, recipes, ids) | _naming(session, plans.where(open_run, elsewhere(Run.id)), ids)


def _naming(session: Session, texts: sa.Select[str, str], ids: set[str]) -> set[str]:
    """Of the rows (id, text) those whose text names one of the ids."""
    return {row_id for row_id, text in session.execute(texts) if ids & set(_ID.findall(text))}


def delete_generation(session: Session, generation_id: str) -> None:
    """Remove a generation that nothing refers to; StillReferenced lists what does."""
    generation = get_generation(session, generation_id)
    # Who begins to need it holds it until that is committed, and is seen then.
    session.execute(sa.select(Generation.id).where(Generation.id == generation_id).with_for_update())
    referrers = list_referrers(session, generation_id)
    if referrers:
        raise StillReferenced(f"generation {generation_id} is needed by {', '.join(referrers[:5])}", referrers=referrers)
    # Its job keeps its event history, so the job no longer claims to have a generation.
    session.execute(sa.update(Job).where(Job.id == generation.job_id).values(generation_id=None))
    forget_files(session, generation_id)
    session.delete(generation)
