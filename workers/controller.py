"""The iteration controller: what the rows say should happen next, and doing it in one transaction.

`decide` is a pure function of a few counts; it runs after every job that ends and in housekeeping, on any number of workers.
A row lock on the run (or set) and the unique (run, iteration, step, part) make doing it twice impossible.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.datasets import get_version
from core.db.events import order_events, order_events_of
from core.db.pseudo_labels import enqueue_selection, get_set, hold_set, list_unwritten_sets, write_next_jobs
from core.db.runs import enqueue_training, hold_run, last_iteration, list_iterations, list_measured_generations, move_run, start_iteration
from core.db.session import Database, now
from core.db.tables import DatasetVersion, Iteration, Job, PseudoLabelSet, Run
from core.errors import NotFound, ServiceError
from core.lifecycle import JOB_STATUSES, STEPS
from core.logs import get_log
from ml.config import Recipe
from ml.errors import MlError
from ml.self_training import GenerationRecord, Stop, next_iteration
from ml.validation import build

WRITING_SECONDS = 0.25
"""The rest of 30 000 labeling jobs is written in the next turns, while the first ones are worked on."""
ORDERING_SECONDS = 0.5
"""So long a turn numbers events; whoever reads a run's events does it for that run."""
Move = Literal["select", "train", "finish", "next", "fail"]
Statuses = Mapping[str, Collection[str]]
"""Step (of a run) or kind (of a set) → the statuses that its jobs have. Not how many: among 30 000 shards that end one by one,
counting them each time would take longer than ending them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rows say of a run and its newest iteration; all that `decide` looks at."""

    run_status: str
    number: int
    phase: str
    control: bool = False
    set_status: str | None = None
    jobs: Statuses = field(default_factory=dict)

    def all_succeeded(self, step: str) -> bool:
        """There are jobs of this step, and each has succeeded."""
        return set(self.jobs.get(step, ())) == {"succeeded"}


def decide(facts: Facts) -> Move | None:
    """The next move of a run, None while there is nothing to do but wait."""
    if facts.run_status != "active":
        return None
    if facts.phase == "done":
        return "next"
    if facts.phase in ("failed", "canceled"):
        return None
    if has_trouble(facts.jobs):
        return "fail"
    if facts.number == 0:
        return "finish" if facts.all_succeeded("train-teacher") else None
    if facts.set_status == "labeling":
        return "select" if facts.all_succeeded("label") else None
    if facts.set_status != "ready":
        return None
    if "train-student" not in facts.jobs:
        return "train"
    complete = facts.all_succeeded("train-student") and (not facts.control or facts.all_succeeded("train-control"))
    return "finish" if complete else None


def decide_set(status: str, jobs: Statuses) -> Move | None:
    """The next move of a pseudo-label set that belongs to no run."""
    if status not in ("labeling", "selecting"):
        return None
    if has_trouble(jobs):
        return "fail"
    return "select" if status == "labeling" and set(jobs.get("label", ())) == {"succeeded"} else None


def has_trouble(jobs: Statuses) -> bool:
    """Whether some job has failed or was canceled for good."""
    return any({"failed", "canceled"} & set(statuses) for statuses in jobs.values())


def advance_all(database: Database) -> None:
    """Move on whatever can be: sets whose jobs are not all written, active runs, sets of their own, versions whose job came to nothing."""
    write_jobs(database)
    open_sets = PseudoLabelSet.status.in_(("labeling", "selecting"))
    with database.reading() as session:
        runs = list(session.scalars(sa.select(Run.id).where(Run.status == "active")))
        # What still happens to a paused one's jobs is told, too.
        told = [*runs, *session.scalars(sa.select(Run.id).where(Run.status == "paused"))]
        sets = list(session.scalars(sa.select(PseudoLabelSet.id).where(PseudoLabelSet.run_id.is_(None), open_sets)))
        versions = list(session.scalars(_versions_without_hope()))
    order_events(database, told, for_seconds=ORDERING_SECONDS)
    for advance, ids in ((advance_run, runs), (advance_set, sets)):
        for identity in ids:
            _advance_alone(advance, database, identity)
    if versions:
        with database.transaction() as session:
            query = sa.update(DatasetVersion).where(DatasetVersion.id.in_(_versions_without_hope().scalar_subquery()))
            session.execute(query.values(status="failed").execution_options(synchronize_session=False))


def write_jobs(database: Database) -> None:
    """Write down labeling jobs of sets that lack some, for a turn, a slice of each set after the other."""
    with database.reading() as session:
        unwritten = deque(list_unwritten_sets(session))
    # Who had the first slice of one turn does not need the first of the next.
    unwritten.rotate(random.randrange(len(unwritten)) if unwritten else 0)
    end = time.monotonic() + WRITING_SECONDS
    while unwritten:
        set_id = unwritten.popleft()
        if _advance_alone(_write_slice, database, set_id):
            unwritten.append(set_id)
        # However slow the database is, a turn writes something.
        if time.monotonic() >= end:
            return


def _write_slice(database: Database, set_id: str) -> bool:
    """True when more of the set is to be written. One that cannot be written fails, or the run to which it belongs."""
    try:
        with database.transaction() as session:
            return write_next_jobs(session, set_id)
    except _CANNOT_GO_ON as error:
        get_log().exception("controller.set_failed", pseudo_label_set_id=set_id)
        with database.reading() as session:
            run_id = get_set(session, set_id).run_id
        if run_id is None:
            _fail_set(database, set_id)
        else:
            _fail_run(database, run_id, error)
        return False


def _advance_alone(advance: Callable[[Database, str], bool], database: Database, identity: str) -> bool:
    """What one row does to the database must not keep the others from moving; a database that is away keeps them all."""
    try:
        return advance(database, identity)
    except sa.exc.OperationalError:
        raise
    except (sa.exc.SQLAlchemyError, *_CANNOT_GO_ON):
        get_log().exception("controller.not_moved", id=identity)
        return False


def _versions_without_hope() -> sa.Select[str]:
    ended = sa.select(Job.id).where(Job.status.in_(("failed", "canceled")))
    return sa.select(DatasetVersion.id).where(DatasetVersion.status == "pending", DatasetVersion.job_id.in_(ended))


_CANNOT_GO_ON = (MlError, ServiceError, LookupError, TypeError, ValueError)
"""What a row can raise that another version wrote, or a recipe that a newer one refuses: one run's trouble must not stop the others."""


def advance_run(database: Database, run_id: str) -> bool:
    """Make every move that the run's rows allow; False when there was none. A run that cannot go on fails; only the database raises."""
    try:
        return _move_on(database, run_id)
    except _CANNOT_GO_ON as error:
        get_log().exception("controller.run_failed", run_id=run_id)
        _fail_run(database, run_id, error)
        return True


def _fail_run(database: Database, run_id: str, error: BaseException) -> None:
    # One that was deleted meanwhile has nothing to say any more.
    with suppress(NotFound), database.transaction() as session:
        if hold_run(session, run_id).status == "active":
            move_run(session, run_id, "failed", error={"code": "run.cannot_go_on", "message": _tell(error)})


def _tell(error: BaseException) -> str:
    known = isinstance(error, MlError | ServiceError)
    return str(error) if known else f"the controller could not make sense of it: {type(error).__name__}: {error}"


def _move_on(database: Database, run_id: str) -> bool:
    with database.reading() as session:
        if decide(read_facts(session, run_id)) is None:
            return False
    with database.transaction() as session:
        run = hold_run(session, run_id)
        while (move := decide(read_facts(session, run_id))) is not None:
            iteration = last_iteration(session, run_id)
            _MOVES[move](session, run, iteration)
            session.flush()
            get_log().info("controller.moved", run_id=run_id, iteration=iteration.number, move=move)
        order_events_of(session, run_id)
    return True


def read_facts(session: Session, run_id: str) -> Facts:
    """A handful of rows, however many shards there are."""
    run = session.get_one(Run, run_id, populate_existing=True)
    iteration = last_iteration(session, run_id)
    labels = session.get(PseudoLabelSet, iteration.pseudo_label_set_id, populate_existing=True) if iteration.pseudo_label_set_id else None
    jobs = _single_jobs(session, run_id, iteration.number)
    if labels is not None and (of_shards := _statuses_of_shards(session, labels)):
        jobs["label"] = of_shards
    return Facts(
        run_status=run.status,
        number=iteration.number,
        phase=iteration.phase,
        control=bool(iteration.plan.get("control")),
        set_status=None if labels is None else labels.status,
        jobs=jobs,
    )


def _single_jobs(session: Session, run_id: str, number: int) -> dict[str, set[str]]:
    """By step, of the steps that are one job each.

    One look a step: asked for several steps at once, PostgreSQL may read all jobs of the iteration and leave the shards out afterwards.
    """
    place = (Job.run_id == run_id, Job.iteration == number, Job.part == 0)
    looks = {step: sa.select(Job.status).where(*place, Job.step == step).scalar_subquery() for step in STEPS if step != "label"}
    found = session.execute(sa.select(*looks.values())).one()
    return {step: {status} for step, status in zip(looks, found, strict=True) if status is not None}


def _statuses_of_shards(session: Session, row: PseudoLabelSet) -> set[str]:
    """Those that some labeling job of the set has: of each status one row is looked for, in the order of ix_jobs_set.

    Jobs that are not written yet are as good as queued.
    """
    first = {
        status: sa.select(Job.status)
        .where(Job.pseudo_label_set_id == row.id, Job.status == status, Job.kind == "label")
        .order_by(Job.priority.desc(), Job.id)
        .limit(1)
        .scalar_subquery()
        for status in JOB_STATUSES
    }
    found = {status for status in session.execute(sa.select(*first.values())).one() if status is not None}
    return found if row.held_job_id is None else found | {"queued"}


def _select(session: Session, _run: Run, iteration: Iteration) -> None:
    row = session.get_one(PseudoLabelSet, iteration.pseudo_label_set_id)
    enqueue_selection(session, row)
    iteration.phase = "selecting"


def _train(session: Session, run: Run, iteration: Iteration) -> None:
    iteration.phase = "training"
    enqueue_training(session, run, iteration, role="student")
    if iteration.plan.get("control"):
        enqueue_training(session, run, iteration, role="control")


def _finish(session: Session, _run: Run, iteration: Iteration) -> None:
    iteration.phase, iteration.finished_at = "done", now(session)


def _fail(session: Session, run: Run, iteration: Iteration) -> None:
    """One job came to nothing: iteration, set and run say so. A retry of that job makes them active again."""
    job = _first_in_trouble(session, Job.run_id == run.id, Job.iteration == iteration.number)
    error = _run_error(job)
    iteration.phase, iteration.finished_at = job.status, now(session)
    if iteration.pseudo_label_set_id is not None and job.kind in ("label", "select"):
        row = session.get_one(PseudoLabelSet, iteration.pseudo_label_set_id)
        row.status, row.finished_at = job.status, now(session)
    session.flush()
    move_run(session, run.id, "failed", error=error)


def _first_in_trouble(session: Session, *where: Any) -> Job:
    """Failed ones first: they say more than a canceled one."""
    query = sa.select(Job).where(*where, Job.status.in_(("failed", "canceled"))).order_by(Job.status.desc(), Job.id).limit(1)
    return session.scalars(query).one()


def _run_error(job: Job) -> dict[str, Any]:
    if job.status == "canceled":
        return {"job_id": job.id, "code": "job.canceled", "message": f"job {job.id} ({job.step}) was canceled; retry it to go on"}
    error = job.error or {}
    facts = {"job_id": job.id, "code": error.get("code", "job.failed"), "message": error.get("message", "")}
    return facts | {name: error[name] for name in ("step", "details") if name in error}


def _next(session: Session, run: Run, iteration: Iteration) -> None:
    """The iteration is done: start the one that follows, or complete the run."""
    if iteration.number >= run.iterations_wanted:
        move_run(session, run.id, "completed", stop_reason="iterations.done")
        return
    recipe = build(Recipe, run.recipe)
    iterations = list_iterations(session, run.id)
    decision = next_iteration(_history(session, run), recipe, wanted=run.iterations_wanted)
    if isinstance(decision, Stop):
        move_run(session, run.id, "completed", stop_reason=decision.code)
        return
    start_iteration(
        session,
        run,
        plan=decision.to_dict(),
        teacher_generation_id=decision.teacher,
        unlabeled=get_version(session, run.unlabeled_version_id),
        keep_keys_of_set_id=None if recipe.selection.reselect else _set_to_keep(run, iterations),
    )


def _history(session: Session, run: Run) -> list[GenerationRecord]:
    """Generation k at index k."""
    return [
        GenerationRecord(id=generation.id, validation_top1=top1, num_parameters=generation.num_parameters)
        for generation, top1 in list_measured_generations(session, run)
    ]


def _set_to_keep(run: Run, iterations: list[Iteration]) -> str | None:
    """The first selection over the run's pool, whose images stay chosen."""
    sets = [row.pseudo_label_set_id for row in iterations if row.phase == "done" and row.unlabeled_version_id == run.unlabeled_version_id]
    return next((set_id for set_id in sets if set_id is not None), None)


_MOVES = {"select": _select, "train": _train, "finish": _finish, "next": _next, "fail": _fail}


def advance_set(database: Database, set_id: str) -> bool:
    """Make the next move of a set that belongs to no run; False when there was none. One that cannot go on fails."""
    try:
        return _move_set_on(database, set_id)
    except _CANNOT_GO_ON:
        get_log().exception("controller.set_failed", pseudo_label_set_id=set_id)
        _fail_set(database, set_id)
        return True


def _fail_set(database: Database, set_id: str) -> None:
    with suppress(NotFound), database.transaction() as session:
        row = hold_set(session, set_id)
        if row.status in ("labeling", "selecting"):
            row.status, row.finished_at = "failed", now(session)


def _move_set_on(database: Database, set_id: str) -> bool:
    with database.reading() as session:
        if _decide_set_row(session, session.get_one(PseudoLabelSet, set_id)) is None:
            return False
    with database.transaction() as session:
        row = hold_set(session, set_id)
        move = _decide_set_row(session, row)
        if move == "select":
            enqueue_selection(session, row)
        elif move == "fail":
            row.status = _first_in_trouble(session, Job.pseudo_label_set_id == set_id).status
            row.finished_at = now(session)
        get_log().info("controller.moved", pseudo_label_set_id=set_id, move=move)
        return move is not None


def _decide_set_row(session: Session, row: PseudoLabelSet) -> Move | None:
    jobs = {"label": _statuses_of_shards(session, row)}
    if row.status == "selecting":
        in_trouble = (Job.pseudo_label_set_id == row.id, Job.status.in_(("failed", "canceled")), Job.kind == "select")
        jobs["select"] = set(session.scalars(sa.select(Job.status).where(*in_trouble)))
    return decide_set(row.status, jobs)
