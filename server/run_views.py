"""What the API shows of runs and their iterations."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from core.db.tables import Iteration, Job, Run, is_open
from core.lifecycle import STEPS
from ml.config import Recipe
from server.recipe_bodies import ShownAs

MAX_JOBS_SHOWN = 200
JOBS_IN_LISTS = 10


class RunDatasets(BaseModel):
    """Ids of the dataset versions that a run uses."""

    labeled: str
    unlabeled: str
    validation: str | None
    """Null: cut from the labeled images by the recipe's `validation_ratio`."""
    test: str | None


class IterationView(BaseModel):
    """Teacher, pseudo-labels, student, once; number 0 makes the first teacher."""

    run_id: str
    number: int
    phase: Literal["labeling", "selecting", "training", "evaluating", "exporting", "done", "failed", "canceled"]
    plan: dict[str, Any]
    """The student's complete config, whether a control is trained beside it, and warnings."""
    teacher_generation_id: str | None
    generation_id: str | None
    """The generation that this iteration made; null until its training succeeded."""
    control_generation_id: str | None
    pseudo_label_set_id: str | None
    unlabeled_version_id: str | None
    jobs: list[str]
    """Its first 200 jobs, in lists of runs 10; `GET /jobs?run_id=` lists all."""
    created_at: datetime
    finished_at: datetime | None


class RunView(BaseModel):
    """Datasets, a recipe, and the chain of iterations made with them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    status: Literal["active", "paused", "completed", "failed", "canceled"]
    recipe: Annotated[dict[str, Any], ShownAs(Recipe)]
    """Complete: preset and overrides, every knob with its value."""
    runtime: dict[str, Any] | None
    """On what it runs; recorded by its first job and kept."""
    iterations_wanted: int
    priority: int
    """Higher ones come first."""
    datasets: RunDatasets
    initial_generation_id: str | None
    stop_reason: str | None
    error: dict[str, Any] | None
    iterations: list[IterationView]
    jobs: Annotated[list[str], Field(max_length=MAX_JOBS_SHOWN)]
    """Its first 200 jobs that are queued or running, in lists of runs 10."""
    created_at: datetime
    updated_at: datetime


def show_iterations(session: Session, run_ids: Sequence[str], *, most_jobs: int = MAX_JOBS_SHOWN) -> dict[str, list[IterationView]]:
    """Every iteration of these runs, 0 first, in two queries."""
    jobs = _first_jobs(session, run_ids, most_jobs)
    query = sa.select(Iteration).where(Iteration.run_id.in_(run_ids)).order_by(Iteration.run_id, Iteration.number)
    views: dict[str, list[IterationView]] = {run_id: [] for run_id in run_ids}
    for row in session.scalars(query):
        values = {name: getattr(row, name) for name in IterationView.model_fields if name != "jobs"}
        views[row.run_id].append(IterationView(**values, jobs=jobs.get((row.run_id, row.number), [])))
    return views


def _first_jobs(session: Session, run_ids: Sequence[str], most: int) -> dict[tuple[str | None, int | None], list[str]]:
    """By run and iteration. A step's jobs are numbered, so the first ones are found without reading the rest."""
    first = (Job.run_id == Iteration.run_id, Job.iteration == Iteration.number, Job.step.in_(STEPS), Job.part < most)
    query = sa.select(Job.run_id, Job.iteration, Job.id).join(Iteration, sa.and_(*first)).where(Iteration.run_id.in_(run_ids))
    found: dict[tuple[str | None, int | None], list[str]] = {}
    for run_id, iteration, job_id in session.execute(query.order_by(Job.id)):
        found.setdefault((run_id, iteration), []).append(job_id)
    return {place: ids[:most] for place, ids in found.items()}


def _open_jobs(session: Session, run_ids: Sequence[str], most: int) -> dict[str | None, list[str]]:
    """The first ones of each run, in one query that reads no others."""
    other = sa.orm.aliased(Job)
    of_run = (other.run_id == Run.id, is_open(other))
    nth = sa.select(other.id).where(*of_run).order_by(other.id).offset(most - 1).limit(1).correlate(Run)
    last = sa.select(sa.func.max(other.id)).where(*of_run).correlate(Run)
    up_to = sa.func.coalesce(nth.scalar_subquery(), last.scalar_subquery())
    query = sa.select(Job.run_id, Job.id).join(Run, sa.and_(Job.run_id == Run.id, is_open(Job), Job.id <= up_to))
    found: dict[str | None, list[str]] = {}
    for run_id, job_id in session.execute(query.where(Run.id.in_(run_ids)).order_by(Job.id)):
        found.setdefault(run_id, []).append(job_id)
    return found


def show_runs(session: Session, runs: Sequence[Run], *, most_jobs: int = JOBS_IN_LISTS) -> list[RunView]:
    """In the order given."""
    ids = [run.id for run in runs]
    iterations, open_jobs = show_iterations(session, ids, most_jobs=most_jobs), _open_jobs(session, ids, most_jobs)
    return [_show(run, iterations[run.id], open_jobs.get(run.id, [])) for run in runs]


def show_run(session: Session, run: Run) -> RunView:
    """One run."""
    return show_runs(session, [run], most_jobs=MAX_JOBS_SHOWN)[0]


def _show(run: Run, iterations: list[IterationView], open_jobs: list[str]) -> RunView:
    return RunView(
        id=run.id,
        name=run.name,
        status=run.status,  # type: ignore[arg-type]  # a CHECK constraint holds it
        recipe=run.recipe,
        runtime=run.runtime,
        iterations_wanted=run.iterations_wanted,
        priority=run.priority,
        datasets=RunDatasets(
            labeled=run.labeled_version_id,
            unlabeled=run.unlabeled_version_id,
            validation=run.validation_version_id,
            test=run.test_version_id,
        ),
        initial_generation_id=run.initial_generation_id,
        stop_reason=run.stop_reason,
        error=run.error,
        iterations=iterations,
        jobs=open_jobs,
        created_at=run.created_at,
        updated_at=run.updated_at,
    )
