"""Runs: start one, read it, pause, resume, cancel, extend, and follow its lineage and events."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.cancellation import hold_open_jobs, request_cancel_all
from core.db.deletion import delete_run
from core.db.runs import create_run, get_run, hold_run, last_iteration, list_iterations, move_run
from core.db.session import now
from core.db.tables import Alias, Generation, Iteration, Job, PseudoLabelSet, Run
from core.errors import InvalidRequest, WrongState
from ml.config import Recipe
from ml.errors import RecipeError
from ml.recipes import PRESETS, build_recipe
from ml.validation import to_dict
from server.dependencies import API, ServicesDep, make_router
from server.idempotency import Answer, OnceDep
from server.job_views import Priority
from server.openapi import problems
from server.pages import Page, PageDep, read_page
from server.progress import RUN_EVENTS, EventPage, answer_events
from server.recipe_bodies import ShownAs
from server.run_checks import Versions, check_all_leakage, check_recipe_fits, find_initial_generation, find_versions
from server.run_views import RunView, show_run, show_runs

router = make_router("runs")

MAX_ITERATIONS = 100
_EXAMPLE: dict[str, Any] = {
    "name": "flowers",
    "datasets": {"labeled": "flowers-labeled", "unlabeled": "flowers-unlabeled", "validation": None, "test": "flowers-test"},
    "preset": "photos-224",
    "recipe": {"seed": 1, "students": [{"ratio": 3}]},
    "iterations": 2,
}


class DatasetReferences(BaseModel):
    """Which dataset versions: an id `dsv_…`, a dataset's name (its latest version), or NAME:NUMBER."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    labeled: Annotated[str, Field(min_length=1, max_length=300)]
    unlabeled: Annotated[str, Field(min_length=1, max_length=300)]
    validation: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """Chooses checkpoints, temperature, stopping and promotions. Null cuts the recipe's `validation_ratio` from the labeled images."""
    test: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """Measured and reported, never used to choose anything."""


class RunRequest(BaseModel):
    """A run to start."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [_EXAMPLE]})

    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """A word for people; null takes the recipe's name."""
    datasets: DatasetReferences
    preset: str | None = None
    """One of `GET /recipes`; null starts from every default."""
    recipe: Annotated[dict[str, Any], ShownAs(Recipe)] = Field(default_factory=dict)
    """Laid over the preset, field by field."""
    iterations: Annotated[int, Field(ge=0, le=MAX_ITERATIONS)] | Literal["manual"] | None = None
    """Null takes the recipe's count; `manual` makes generation 0 and waits for `POST /runs/{id}/iterations`."""
    initial_generation: Annotated[str, Field(max_length=100)] | None = None
    """A generation that takes generation 0's place, so that no teacher is trained."""
    priority: Priority = 0
    """Of two waiting jobs the one of the higher priority is started first; the run's jobs have it. Nothing that runs is interrupted."""


class ExtendRequest(BaseModel):
    """More iterations for a run."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"iterations": 1}]})

    iterations: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]


class Accuracy(BaseModel):
    """Top-1 on one split, with its 95 % interval."""

    top1: float
    interval: tuple[float, float]
    num_images: int


class LineageEntry(BaseModel):
    """One generation of a run, and what it was made from."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    iteration: int
    generation_id: str
    role: str
    architecture: str
    num_parameters: int
    teacher_generation_id: str | None
    pseudo_label_set_id: str | None
    num_pseudo_labels: int | None
    """Rows that the student saw, repeats included."""
    num_pseudo_labeled_images: int | None
    """Different images among them."""
    validation: Accuracy | None
    test: Accuracy | None
    aliases: list[str]
    created_at: datetime


class Lineage(BaseModel):
    """Every generation of a run in the order of its iterations, each control after its student."""

    run_id: str
    generations: list[LineageEntry]


@router.post("/runs", summary="Start a run", status_code=202, response_model=RunView, responses=problems(404, 409, 413, 415))
def start_run(body: RunRequest, services: ServicesDep, once: OnceDep) -> Response:
    """Generation 0 is trained on the labeled images (unless `initial_generation` takes its place), then the iterations follow.

    Refused before anything is written: datasets that are not ready or of the wrong kind, classes that differ, evaluation images that also
    sit in labeled or unlabeled, test images that also sit in validation (`leakage`, the keys listed), and recipes that these datasets
    cannot satisfy.
    """
    recipe = _build_recipe(body)
    manual = body.iterations == "manual"
    iterations = recipe.iterations.count if body.iterations is None else 0 if manual else int(body.iterations)
    with services.database.reading() as session:
        before = once.find(session)
        if before is not None:
            return before
        versions = find_versions(session, body.datasets.model_dump())
        initial = find_initial_generation(session, body.initial_generation, versions.labeled)
        wanted = MAX_ITERATIONS if manual else iterations
        roots = services.settings.roots
        check_recipe_fits(session, recipe, versions, iterations=wanted, has_initial=initial is not None, roots=roots)
    check_all_leakage(services.files, versions)
    with services.database.transaction() as session:
        return once.run(session, lambda: _insert(session, body, recipe, iterations, versions))


def _build_recipe(body: RunRequest) -> Recipe:
    if body.preset is not None and body.preset not in PRESETS:
        raise InvalidRequest(f"there is no preset {body.preset!r}; known: {', '.join(PRESETS)}", pointer="/preset")
    try:
        return build_recipe(body.preset, body.recipe)
    except RecursionError as error:
        raise RecipeError("the recipe is nested too deeply") from error


def _insert(session: Session, body: RunRequest, recipe: Recipe, iterations: int, versions: Versions) -> Answer:
    run, _ = create_run(
        session,
        name=body.name or recipe.name,
        recipe=to_dict(recipe),
        iterations=iterations,
        labeled=versions.labeled,
        unlabeled=versions.unlabeled,
        validation=versions.validation,
        test=versions.test,
        initial_generation_id=body.initial_generation,
        priority=body.priority,
    )
    return _accepted(session, run)


def _accepted(session: Session, run: Run) -> Answer:
    session.flush()
    return Answer(show_run(session, run), location=f"{API}/runs/{run.id}")


@router.get("/runs", summary="List runs", responses=problems())
def list_runs(
    services: ServicesDep,
    page: PageDep,
    status: Annotated[Literal["active", "paused", "completed", "failed", "canceled"] | None, Query(description="Only these.")] = None,
) -> Page[RunView]:
    """Newest first."""
    among = None if status is None else (Run.status, status)
    with services.database.reading() as session:
        rows, cursor = read_page(session, sa.select(Run), Run.id, page, cursors=services.cursors, listing=f"runs:{status}", among=among)
        return Page(items=show_runs(session, rows), next_cursor=cursor)


@router.get("/runs/{run_id}", summary="Read a run", responses=problems(404))
def read_run(run_id: str, services: ServicesDep) -> RunView:
    """With its iterations and open jobs."""
    with services.database.reading() as session:
        return show_run(session, get_run(session, run_id))


@router.post("/runs/{run_id}/pause", summary="Pause a run", responses=problems(404, 409))
def pause_run(run_id: str, services: ServicesDep) -> RunView:
    """Jobs that run go on to their end; none is started until the run is resumed. Pausing twice changes nothing."""
    with services.database.transaction() as session:
        return show_run(session, move_run(session, run_id, "paused"))


@router.post("/runs/{run_id}/resume", summary="Resume a paused run", responses=problems(404, 409))
def resume_run(run_id: str, services: ServicesDep) -> RunView:
    """Its waiting jobs may be started again."""
    with services.database.transaction() as session:
        status = hold_run(session, run_id).status
        if status not in ("paused", "active"):
            raise WrongState(f"run {run_id} is {status}; only a paused run can be resumed", status=status)
        return show_run(session, move_run(session, run_id, "active"))


@router.post("/runs/{run_id}/cancel", summary="Cancel a run", responses=problems(404, 409))
def cancel_run(run_id: str, services: ServicesDep) -> RunView:
    """Its waiting jobs are canceled at once, the running ones at their next heartbeat. What was made stays. Twice changes nothing."""
    with services.database.transaction() as session:
        # Jobs before their run, as everybody who writes both.
        hold_open_jobs(session, Job.run_id == run_id)
        hold_run(session, run_id)
        # Those, too, that the controller inserted while this waited for the run.
        request_cancel_all(session, Job.run_id == run_id)
        run = move_run(session, run_id, "canceled")
        moment = now(session)
        unfinished = sa.update(Iteration).where(Iteration.run_id == run_id, Iteration.phase.not_in(lifecycle.PHASE_TERMINAL))
        session.execute(unfinished.values(phase="canceled", finished_at=moment))
        half_made = sa.update(PseudoLabelSet).where(PseudoLabelSet.run_id == run_id, PseudoLabelSet.status.in_(("labeling", "selecting")))
        session.execute(half_made.values(status="canceled", finished_at=moment))
        return show_run(session, run)


@router.post(
    "/runs/{run_id}/extend", summary="Ask for more iterations", status_code=202, response_model=RunView, responses=problems(404, 409)
)
def extend_run(run_id: str, body: ExtendRequest, services: ServicesDep, once: OnceDep) -> Response:
    """Added to those wanted so far; for a completed run, to those it made. 409 for a run that its own gain rule ended."""
    with services.database.transaction() as session:

        def extend() -> Answer:
            run = hold_run(session, run_id)
            if run.status not in ("active", "paused", "completed"):
                raise WrongState(
                    f"run {run_id} is {run.status}; only an active, paused or completed run can be extended", status=run.status
                )
            if run.status == "completed" and run.stop_reason == "validation.gain":
                raise WrongState(
                    f"run {run_id} ended because validation gained too little, and would end again at once; "
                    f"POST {API}/runs/{run_id}/iterations makes one more iteration all the same",
                    status=run.status,
                    stop_reason=run.stop_reason,
                )
            base = last_iteration(session, run_id).number if run.status == "completed" else run.iterations_wanted
            if base + body.iterations > 10 * MAX_ITERATIONS:
                raise InvalidRequest(f"a run has at most {10 * MAX_ITERATIONS} iterations", pointer="/iterations")
            run.iterations_wanted = base + body.iterations
            session.flush()
            return _accepted(session, move_run(session, run_id, "active") if run.status == "completed" else run)

        return once.run(session, extend)


@router.delete("/runs/{run_id}", summary="Delete a run", status_code=204, responses=problems(404, 409))
def remove_run(run_id: str, services: ServicesDep) -> Response:
    """With its iterations, jobs, events, pseudo-label sets and generations; their files follow after a while. Its datasets stay.

    409 while it has not ended, and with the referrers while an alias or its history, another run, a generation or a pseudo-label set
    needs one of its generations.
    """
    with services.database.transaction() as session:
        generations = delete_run(session, run_id)
    for generation_id in generations:
        services.serving.predictor.forget(generation_id)
    return Response(status_code=204)


@router.get("/runs/{run_id}/lineage", summary="Read the lineage", responses=problems(404))
def read_lineage(run_id: str, services: ServicesDep) -> Lineage:
    """Which generation taught which, from how many pseudo-labels, and how good each is with its 95 % interval."""
    with services.database.reading() as session:
        get_run(session, run_id)
        made = [
            (iteration, generation_id)
            for iteration in list_iterations(session, run_id)
            for generation_id in (iteration.generation_id, iteration.control_generation_id)
        ]
        ids = [generation_id for _, generation_id in made if generation_id is not None]
        generations = {row.id: row for row in session.scalars(sa.select(Generation).where(Generation.id.in_(ids)))}
        set_ids = [row.pseudo_label_set_id for row in generations.values() if row.pseudo_label_set_id is not None]
        reports: dict[str, Any] = dict(
            session.execute(sa.select(PseudoLabelSet.id, PseudoLabelSet.report).where(PseudoLabelSet.id.in_(set_ids))).all()
        )
        aliases: dict[str, list[str]] = {}
        named = sa.select(Alias.generation_id, Alias.name).where(Alias.generation_id.in_(ids)).order_by(Alias.name)
        for generation_id, name in session.execute(named):
            aliases.setdefault(generation_id, []).append(name)
        entries = [
            _show_entry(iteration, generation, reports.get(generation.pseudo_label_set_id or "") or {}, aliases.get(generation.id, []))
            for iteration, generation_id in made
            if (generation := generations.get(generation_id or "")) is not None
        ]
        return Lineage(run_id=run_id, generations=entries)


def _show_entry(iteration: Iteration, generation: Generation, report: dict[str, Any], aliases: list[str]) -> LineageEntry:
    return LineageEntry(
        iteration=iteration.number,
        generation_id=generation.id,
        role=generation.role,
        architecture=generation.architecture,
        num_parameters=generation.num_parameters,
        teacher_generation_id=generation.teacher_generation_id,
        pseudo_label_set_id=generation.pseudo_label_set_id,
        num_pseudo_labels=report.get("num_rows"),
        num_pseudo_labeled_images=report.get("num_unique"),
        validation=_accuracy(generation.metrics.get("validation")),
        test=_accuracy(generation.metrics.get("test")),
        aliases=aliases,
        created_at=generation.created_at,
    )


def _accuracy(measured: dict[str, Any] | None) -> Accuracy | None:
    if not measured:
        return None
    return Accuracy(top1=measured["top1"], interval=tuple(measured["interval"]), num_images=measured["num_images"])


@router.get(
    "/runs/{run_id}/events",
    summary="Follow a run",
    response_model=EventPage,
    responses=problems(404) | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def read_run_events(
    run_id: str,
    request: Request,
    services: ServicesDep,
    after: Annotated[int | None, Query(ge=0, description="Only events numbered above this; wins over Last-Event-ID.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events a page; a stream ignores it.")] = 200,
) -> Response | EventPage:
    """Every event of every job of the run, in the run's own numbers: a stream for `Accept: text/event-stream`, else one page of JSON."""
    return await answer_events(request, services.progress, RUN_EVENTS, run_id, after=after, limit=limit)
