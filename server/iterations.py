"""Iterations: exactly one more, with another teacher, student, ratio, noise or pool when that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.datasets import get_ready_version, get_version
from core.db.runs import get_run, hold_run, last_iteration, list_iterations, list_measured_generations, move_run, start_iteration
from core.db.tables import DatasetVersion, Run
from core.errors import InvalidRequest, NotFound, WrongState
from ml.config import NoiseConfig, Recipe, StudentConfig
from ml.errors import RecipeError
from ml.self_training import GenerationRecord, IterationPlan, Stop, next_iteration
from ml.validation import build
from server.dependencies import API, ServicesDep, make_router
from server.idempotency import Answer, OnceDep
from server.openapi import problems
from server.recipe_bodies import ShownAs, repointed
from server.run_checks import Versions, check_leakage, check_recipe_fits, find_labeler
from server.run_views import IterationView, show_iterations

router = make_router("runs")

_EXAMPLE: dict[str, Any] = {"ratio": 5, "noise": {"randaugment_magnitude": 15}}


class IterationRequest(BaseModel):
    """One iteration; whatever is left out comes from the recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [_EXAMPLE]})

    teacher: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """The generation that labels; null takes the run's newest."""
    student: Annotated[dict[str, Any], ShownAs(StudentConfig)] | None = None
    """Laid over the recipe's student of this iteration."""
    ratio: Annotated[int, Field(ge=1, le=64)] | None = None
    """Short for `student.ratio`."""
    noise: Annotated[dict[str, Any], ShownAs(NoiseConfig)] | None = None
    """Short for `student.noise`."""
    unlabeled: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """Another pool, or a newer version of it; null takes the run's."""


class IterationList(BaseModel):
    """A run's iterations, 0 first."""

    items: list[IterationView]


@router.get("/runs/{run_id}/iterations", summary="List a run's iterations", responses=problems(404))
def list_run_iterations(run_id: str, services: ServicesDep) -> IterationList:
    """All of them; a run has few."""
    with services.database.reading() as session:
        get_run(session, run_id)
        return IterationList(items=show_iterations(session, [run_id])[run_id])


@router.post(
    "/runs/{run_id}/iterations",
    summary="Start one more iteration",
    status_code=202,
    response_model=IterationView,
    responses=problems(404, 409, 413, 415),
)
def start_one_iteration(
    run_id: str,
    services: ServicesDep,
    once: OnceDep,
    body: Annotated[IterationRequest | None, Body(examples=[_EXAMPLE])] = None,
) -> Response:
    """The newest generation labels the pool, and a student learns from it. 409 while another iteration is in progress."""
    body = body or IterationRequest()
    with services.database.reading() as session:
        before = once.find(session)
        if before is not None:
            return before
        run = get_run(session, run_id)
        pool = _find_pool(session, run, body)
        evaluation = {
            name: get_version(session, version_id)
            for name, version_id in (("validation", run.validation_version_id), ("test", run.test_version_id))
            if version_id is not None
        }
    if pool.id != run.unlabeled_version_id:
        check_leakage(services.files, evaluation, {"unlabeled": pool})
    with services.database.transaction() as session:
        return once.run(session, lambda: _start(session, run_id, body, pool, services.settings.roots))


def _find_pool(session: Session, run: Run, body: IterationRequest) -> DatasetVersion:
    if body.unlabeled is None:
        return get_version(session, run.unlabeled_version_id)
    try:
        return get_ready_version(session, body.unlabeled, kind="unlabeled", pointer="/unlabeled")
    except NotFound as error:
        raise InvalidRequest(str(error), pointer="/unlabeled") from error


def _start(session: Session, run_id: str, body: IterationRequest, pool: DatasetVersion, roots: tuple[Path, ...]) -> Answer:
    run = hold_run(session, run_id)
    last = last_iteration(session, run_id)
    if run.status not in ("active", "completed"):
        raise WrongState(f"run {run_id} is {run.status}; only an active or completed run can have one more iteration", status=run.status)
    if last.phase not in lifecycle.PHASE_TERMINAL:
        raise WrongState(
            f"iteration {last.number} of run {run_id} is {last.phase}; wait for its end", iteration=last.number, phase=last.phase
        )
    labeled = get_version(session, run.labeled_version_id)
    plan = _plan(session, run, body)
    if body.teacher is not None:
        find_labeler(session, body.teacher, labeled, pointer="/teacher")
    _check_fits(session, run, plan, pool, roots)
    iteration = start_iteration(
        session,
        run,
        plan=plan.to_dict(),
        teacher_generation_id=plan.teacher,
        unlabeled=pool,
        keep_keys_of_set_id=_set_to_keep(session, run, pool),
    )
    run.iterations_wanted = max(run.iterations_wanted, iteration.number)
    session.flush()
    if run.status == "completed":
        move_run(session, run_id, "active")
    view = show_iterations(session, [run_id])[run_id][-1]
    return Answer(view, location=f"{API}/runs/{run_id}/iterations")


def _plan(session: Session, run: Run, body: IterationRequest) -> IterationPlan:
    history = _history(session, run)
    if not history:
        raise WrongState(f"run {run.id} has no generation that could label; its first training ended without one")
    overrides = dict(body.student or {})
    if body.ratio is not None:
        overrides["ratio"] = body.ratio
    if body.noise is not None:
        overrides["noise"] = {**overrides.get("noise", {}), **body.noise} if isinstance(overrides.get("noise", {}), dict) else body.noise
    try:
        plan = next_iteration(history, build(Recipe, run.recipe), wanted=len(history), teacher=body.teacher, overrides=overrides)
    except RecipeError as error:
        in_noise = body.noise is not None and error.pointer.startswith("/noise")
        raise repointed(error, "" if in_noise else "/student") from error
    assert not isinstance(plan, Stop), "whoever asks for an iteration gets it"
    return plan


def _history(session: Session, run: Run) -> list[GenerationRecord]:
    """The run's generations in order."""
    return [
        GenerationRecord(id=generation.id, validation_top1=top1, num_parameters=generation.num_parameters)
        for generation, top1 in list_measured_generations(session, run)
    ]


def _check_fits(session: Session, run: Run, plan: IterationPlan, pool: DatasetVersion, roots: tuple[Path, ...]) -> None:
    """The same checks as at the run's start, for this student and this pool."""
    recipe = build(Recipe, {**run.recipe, "students": [plan.to_dict()["student"]]})
    validation = None if run.validation_version_id is None else get_version(session, run.validation_version_id)
    labeled = get_version(session, run.labeled_version_id)
    versions = Versions(labeled=labeled, unlabeled=pool, validation=validation, test=None)
    try:
        check_recipe_fits(session, recipe, versions, iterations=1, has_initial=True, roots=roots)
    except InvalidRequest as error:
        pointer = str(error.details.get("pointer", ""))
        error.details["pointer"] = pointer.replace("/recipe/students/0", "/student", 1)
        raise


def _set_to_keep(session: Session, run: Run, pool: DatasetVersion) -> str | None:
    """With `reselect` off, the first selection's images stay, as long as the pool is the same."""
    if run.recipe["selection"]["reselect"]:
        return None
    sets = [
        row.pseudo_label_set_id
        for row in list_iterations(session, run.id)
        if row.pseudo_label_set_id is not None and row.phase == "done" and row.unlabeled_version_id == pool.id
    ]
    return sets[0] if sets else None
