"""What the API shows of runs and their iterations."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from core.db.tables import Iteration, Job, Run
from ml.config import Recipe
from server.recipe_bodies import ShownAs

MAX_JOBS_SHOWN = 200


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
    """Its first 200 jobs; `GET /jobs?run_id=` lists all."""
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
    """Its first 200 jobs that are queued or running."""
    created_at: datetime
    updated_at: datetime


def show_iterations(session: Session, run_ids: Sequence[str]) -> dict[str, list[IterationView]]:
    """Every iteration of these runs, 0 first, in two queries."""
    jobs = _first_jobs(session, run_ids)
    query = sa.select(Iteration).where(Iteration.run_id.in_(run_ids)).order_by(Iteration.run_id, Iteration.number)
    views: dict[str, list[IterationView]] = {run_id: [] for run_id in run_ids}
    for row in session.scalars(query):
        values = {name: getattr(row, name) for name in IterationView.model_fields if name != "jobs"}
        views[row.run_id].append(IterationView(**values, jobs=jobs.get((row.run_id, row.number), [])))
    return views


def _first_jobs(session: Session, run_ids: Sequence[str]) -> dict[tuple[str, int], list[str]]:
    place = sa.func.row_number().over(partition_by=(Job.run_id, Job.iteration), order_by=Job.id).label("place")
    ranked = sa.select(Job.run_id, Job.iteration, Job.id, place).where(Job.run_id.in_(run_ids)).subquery()
    query = sa.select(ranked.c.run_id, ranked.c.iteration, ranked.c.id).where(ranked.c.place <= MAX_JOBS_SHOWN).order_by(ranked.c.id)
    found: dict[tuple[str, int], list[str]] = {}
    for run_id, iteration, job_id in session.execute(query):
        found.setdefault((run_id, iteration), []).append(job_id)
    return found


def show_runs(session: Session, runs: Sequence[Run]) -> list[RunView]:
    """In the order given."""
    iterations = show_iterations(session, [run.id for run in runs])
    return [_show(session, run, iterations[run.id]) for run in runs]


def show_run(session: Session, run: Run) -> RunView:
    """One run."""
    return show_runs(session, [run])[0]


def _show(session: Session, run: Run, iterations: list[IterationView]) -> RunView:
    is_open = sa.select(Job.id).where(Job.run_id == run.id, Job.status.in_(("queued", "running")))
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
        jobs=list(session.scalars(is_open.order_by(Job.id).limit(MAX_JOBS_SHOWN))),
        created_at=run.created_at,
        updated_at=run.updated_at,
    )
