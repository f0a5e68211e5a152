"""Runs and their iterations: the rows that the API writes and the iteration controller moves on.

A recipe is JSON here; whoever calls has validated it through ml.config.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.events import order_events_of
from core.db.generations import hold_generations, named_generations
from core.db.jobs import NewJob, enqueue, move_waiting
from core.db.pseudo_labels import create_set
from core.db.session import now
from core.db.tables import DatasetVersion, Generation, Iteration, Job, Run
from core.db.workers import capabilities_lately, offered_capabilities
from core.errors import WrongState
from core.ids import absent, new_id


def create_run(
    session: Session,
    *,
    name: str,
    recipe: dict[str, Any],
    iterations: int,
    labeled: DatasetVersion,
    unlabeled: DatasetVersion,
    validation: DatasetVersion | None,
    test: DatasetVersion | None,
    initial_generation_id: str | None,
    priority: int = 0,
) -> tuple[Run, Job | None]:
    """Insert the run and generation 0's training job; with an initial generation, iteration 0 is done at once and there is no job."""
    # With an initial generation there is no teacher to train, and its weights are never opened.
    opened = recipe if initial_generation_id is None else recipe | {"teacher": None}
    hold_generations(session, [*named_generations(opened), *([] if initial_generation_id is None else [initial_generation_id])])
    moment = now(session)
    run = Run(
        id=new_id("run"),
        name=name,
        status="active",
        recipe=recipe,
        iterations_wanted=iterations,
        labeled_version_id=labeled.id,
        unlabeled_version_id=unlabeled.id,
        validation_version_id=validation.id if validation else None,
        test_version_id=test.id if test else None,
        initial_generation_id=initial_generation_id,
        priority=priority,
        num_events=0,
        created_at=moment,
        updated_at=moment,
    )
    session.add(run)
    session.flush()
    iteration = Iteration(id=new_id("iteration"), run_id=run.id, number=0, phase="training", plan={}, created_at=moment)
    session.add(iteration)
    if initial_generation_id is not None:
        iteration.phase, iteration.generation_id, iteration.finished_at = "done", initial_generation_id, moment
        session.flush()
        return run, None
    session.flush()
    job = enqueue_training(session, run, iteration, role="teacher")
    # Who holds the run's row anyway numbers at once: workers of an older version would give the next event of this job a number before.
    order_events_of(session, run.id)
    return run, job


def run_capability(session: Session, run: Run) -> str:
    """The queue of the run's heavy jobs: what its recorded runtime used, else what its recipe asks for.

    A recipe that leaves the device open takes CUDA when a worker offers it now.
    """
    device = (run.runtime or run.recipe["runtime"])["device"]
    if device == "auto":
        return "cuda" if "cuda" in offered_capabilities(session) else "cpu"
    return str(device)


def move_to_offered_devices(session: Session, *, unseen_seconds: float, limit: int = 200) -> list[Job]:
    """Let waiting jobs of runs that left their device open go where workers are. Returns those that moved; ask until there are none.

    Nothing is fixed before a run's first job has recorded its runtime. Until then, a job whose capability no worker has offered for
    `unseen_seconds` goes to the other one, if that is offered now. Afterwards, jobs that were queued before it follow the record.
    """
    device_of_run = Run.runtime["device"].as_string()
    followers = sa.and_(Run.runtime.is_not(None), device_of_run != Job.capability)
    lately, offered = capabilities_lately(session, within_seconds=unseen_seconds), offered_capabilities(session)
    other = {here: there for here, there in (("cuda", "cpu"), ("cpu", "cuda")) if here not in lately and there in offered}
    since = now(session) - timedelta(seconds=unseen_seconds)
    open_ones = sa.and_(Run.runtime.is_(None), Job.capability.in_(list(other)), Job.created_at < since)
    query = (
        sa.select(Job, Run.runtime)
        .join(Run, Run.id == Job.run_id)
        .where(
            Job.status == "queued",
            Job.kind.in_(("train", "label")),
            Run.recipe["runtime"]["device"].as_string() == "auto",
            sa.or_(followers, open_ones),
        )
        .order_by(Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=Job)
    )
    found = session.execute(query.execution_options(populate_existing=True)).all()
    for job, runtime in found:
        if runtime is None:
            reason = f"no worker has taken jobs with capability {job.capability} for {unseen_seconds:.0f} seconds"
            move_waiting(session, job, other[job.capability], reason=reason)
        else:
            move_waiting(session, job, runtime["device"], reason=f"the run's first job ran on {runtime['device']}")
    return [job for job, _ in found]


def enqueue_training(session: Session, run: Run, iteration: Iteration, *, role: str) -> Job:
    """Insert the training job of one role (teacher, student, control) of an iteration."""
    job_input: dict[str, Any] = {
        "role": role,
        "student": iteration.plan.get("student"),
        "teacher_generation_id": iteration.teacher_generation_id,
        "pseudo_label_set_id": iteration.pseudo_label_set_id if role == "student" else None,
        "unlabeled_version_id": iteration.unlabeled_version_id,
    }
    wanted = NewJob(
        kind="train",
        input=job_input,
        capability=run_capability(session, run),
        run_id=run.id,
        iteration=iteration.number,
        step=f"train-{role}",
        part=0,
        generation_id=new_id("generation"),
        # The student leads to the next iteration; its control only reports.
        priority=run.priority - 1 if role == "control" else run.priority,
    )
    [job] = enqueue(session, [wanted])
    return job


def start_iteration(
    session: Session,
    run: Run,
    *,
    plan: dict[str, Any],
    teacher_generation_id: str,
    unlabeled: DatasetVersion,
    keep_keys_of_set_id: str | None = None,
) -> Iteration:
    """Insert the next iteration, its pseudo-label set and its labeling jobs. `plan`: student, control (bool), warnings."""
    number = last_iteration(session, run.id).number + 1
    recipe = run.recipe
    evaluation = [version for version in (run.validation_version_id, run.test_version_id) if version]
    selection_generation_id = next(named_generations(recipe["labeling"]), None)
    choosing = [] if selection_generation_id is None else [selection_generation_id]
    hold_generations(session, [*named_generations(plan), teacher_generation_id, *choosing])
    row = create_set(
        session,
        generation_id=teacher_generation_id,
        unlabeled_version_id=unlabeled.id,
        num_images=unlabeled.num_images or 0,
        labeling=recipe["labeling"],
        selection=recipe["selection"],
        seed=recipe["seed"],
        capability=run_capability(session, run),
        runtime=run.runtime or recipe["runtime"],
        evaluation_version_ids=evaluation,
        run_id=run.id,
        iteration=number,
        selection_generation_id=selection_generation_id,
        keep_keys_of_set_id=keep_keys_of_set_id,
        priority=run.priority,
    )
    iteration = Iteration(
        id=new_id("iteration"),
        run_id=run.id,
        number=number,
        phase="labeling",
        plan=plan,
        teacher_generation_id=teacher_generation_id,
        pseudo_label_set_id=row.id,
        unlabeled_version_id=unlabeled.id,
        created_at=now(session),
    )
    session.add(iteration)
    session.flush()
    order_events_of(session, run.id)
    return iteration


def get_run(session: Session, run_id: str) -> Run:
    """NotFound when there is none."""
    run = session.get(Run, run_id, populate_existing=True)
    if run is None:
        raise absent("run", run_id)
    return run


def hold_run(session: Session, run_id: str) -> Run:
    """The run, held against other writers until the transaction ends; NotFound when it is gone.

    Not against who only refers to it: a claim or a new job of the run must not wait, for a controller that may wait for that job.
    """
    run = session.get(Run, run_id, with_for_update={"key_share": True}, populate_existing=True)
    if run is None:
        raise absent("run", run_id)
    return run


def list_iterations(session: Session, run_id: str) -> list[Iteration]:
    """The run's iterations, 0 first."""
    return list(session.scalars(sa.select(Iteration).where(Iteration.run_id == run_id).order_by(Iteration.number)))


def last_iteration(session: Session, run_id: str) -> Iteration:
    """The run's newest iteration; every run has iteration 0."""
    return session.scalars(sa.select(Iteration).where(Iteration.run_id == run_id).order_by(Iteration.number.desc()).limit(1)).one()


def move_run(session: Session, run_id: str, new: str, *, error: dict[str, Any] | None = None, stop_reason: str | None = None) -> Run:
    """Change the run's status in one UPDATE; a no-op when it has it already, WrongState when the table forbids the move."""
    sources = lifecycle.sources_of(lifecycle.RUN_MOVES, new)
    values: dict[str, Any] = {
        "status": new,
        "updated_at": now(session),
        "error": sa.null() if error is None else error,
        "stop_reason": stop_reason,
    }
    query = sa.update(Run).where(Run.id == run_id, Run.status.in_(sources)).values(**values).returning(Run)
    moved = session.scalars(query.execution_options(synchronize_session=False, populate_existing=True)).one_or_none()
    if moved is not None:
        if new in lifecycle.RUN_ENDED:
            # Whoever sees the end of a run sees every event before it.
            order_events_of(session, run_id)
        return moved
    run = get_run(session, run_id)
    if run.status != new:
        raise WrongState(f"run {run_id} is {run.status} and cannot become {new}", status=run.status)
    return run


def list_measured_generations(session: Session, run: Run) -> list[tuple[Generation, float]]:
    """Generation k at index k, with its top-1 on the run's validation images.

    NaN, which compares with nothing, for one that was imported or that another run measured on other images.
    """
    found = []
    for iteration in list_iterations(session, run.id):
        generation = None if iteration.generation_id is None else session.get(Generation, iteration.generation_id)
        if generation is None:
            continue
        origin = None if generation.run_id is None else session.get(Run, generation.run_id)
        measured = generation.metrics.get("validation") if origin is not None and _validates_alike(origin, run) else None
        found.append((generation, float((measured or {}).get("top1", math.nan))))
    return found


def _validates_alike(one: Run, other: Run) -> bool:
    """Whether both runs measure on the same validation images: given ones, or cut alike from the same labeled ones."""
    if one.validation_version_id is not None or other.validation_version_id is not None:
        return one.validation_version_id == other.validation_version_id

    def cut(run: Run) -> tuple[object, ...]:
        return run.labeled_version_id, run.recipe["validation_ratio"], run.recipe["seed"]

    return cut(one) == cut(other)
