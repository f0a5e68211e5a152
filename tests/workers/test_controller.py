"""The iteration controller: what follows from the rows, and that it follows once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.pseudo_labels import get_set
from core.db.runs import create_run, get_run, list_iterations, move_run
from core.db.session import Database
from core.db.tables import Dataset, DatasetVersion, Job, Run
from core.db.workers import WorkerDescription, register_worker, see_worker
from ml.recipes import build_recipe
from ml.validation import to_dict
from workers import controller
from workers.controller import Facts, advance_all, advance_run, decide, decide_set
from workers.outcomes import record_success

DIGEST = {"digest": "0" * 64, "num_bytes": 1}


def add_dataset(session: Session, name: str, kind: str) -> DatasetVersion:
    manifest = DIGEST | {"num_images": 40, "num_usable": 40, "class_names": ["cat", "dog"]}
    version, _ = add_version(session, create_dataset(session, name=name, kind=kind), source={}, ingest=False)
    finish_version(session, version.id, manifest=manifest, report={})
    return version


def find_dataset(session: Session, name: str) -> DatasetVersion:
    return session.scalars(sa.select(DatasetVersion).join(Dataset).where(Dataset.name == name)).one()


def add_run(
    database: Database,
    *,
    iterations: int = 1,
    recipe: dict[str, Any] | None = None,
    initial: str | None = None,
    of: str | None = "",
    priority: int = 0,
) -> str:
    """A run with three label shards an iteration, on datasets of its own; of None: on those of the first run."""
    overrides = {"labeling": {"shard_size": 16}, "iterations": {"control": False}} | (recipe or {})
    with database.transaction() as session:
        run, _ = create_run(
            session,
            name="run",
            recipe=to_dict(build_recipe("digits", overrides)),
            iterations=iterations,
            labeled=find_dataset(session, "labeled") if of is None else add_dataset(session, f"labeled{of}", "labeled"),
            unlabeled=find_dataset(session, "unlabeled") if of is None else add_dataset(session, f"unlabeled{of}", "unlabeled"),
            validation=None,
            test=None,
            initial_generation_id=initial,
            priority=priority,
        )
        return run.id


def result_of(job: Job, *, top1: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a real attempt of this kind would have made: (result, stored files)."""
    if job.kind == "label":
        return {"num_rows": 16}, {"shard.parquet": DIGEST}
    if job.kind == "select":
        return {"report": {"num_unique": 8, "num_rows": 16}}, {"selected.parquet": DIGEST, "items.parquet": DIGEST}
    metrics = {"role": job.input["role"], "architecture": "test_resnet", "num_parameters": 10, "validation": {"top1": top1}}
    return {"metrics": metrics, "class_names": ["cat", "dog"], "lineage": {}}, {"model.safetensors": DIGEST}


def finish_next(database: Database, *, top1: float = 0.5) -> str | None:
    """Claim one job and let it succeed; its step, None when nothing waits."""
    with database.transaction() as session:
        job = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        if job is None:
            return None
        made, files = result_of(job, top1=top1)
        assert record_success(session, job, made, files, {}) is not None
        return job.step or job.kind


def fail_next(database: Database, **error: Any) -> str:
    with database.transaction() as session:
        job = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert job is not None
        jobs.fail(session, job.id, token=job.token, error={"class": "permanent", "code": "x", "message": "m", **error}, backoff_seconds=0)
        return job.id


def play(database: Database, *, top1: list[float] | None = None) -> list[str]:
    """Alternate between work and controller until nothing happens; the steps in their order."""
    steps: list[str] = []
    tops = list(top1 or [])
    advance_all(database)
    while (step := finish_next(database, top1=tops[0] if tops else 0.5)) is not None:
        if step.startswith("train") and tops:
            tops.pop(0)
        steps.append(step)
        advance_all(database)
    return steps


def read_run(database: Database, run_id: str) -> Run:
    with database.reading() as session:
        return get_run(session, run_id)


ITERATION = ["label", "label", "label", "select", "train-student"]


def test_a_run_that_leaves_the_device_open_goes_where_cuda_is_offered(database: Database):
    with database.transaction() as session:
        description = WorkerDescription(name="gpu", host="h", boot_id="b", pid=1, capabilities=("cuda",), slots=1, version="0")
        worker_id = register_worker(session, description).id
    auto = add_run(database, recipe={"runtime": {"device": "auto"}}, of="-auto")
    fixed = add_run(database, recipe={"runtime": {"device": "cpu"}}, of="-fixed")
    with database.transaction() as session:
        see_worker(session, worker_id, stopped=True)
    without = add_run(database, of="-without")

    with database.reading() as session:
        found = {run_id: session.scalar(sa.select(Job.capability).where(Job.run_id == run_id)) for run_id in (auto, fixed, without)}
    assert found == {auto: "cuda", fixed: "cpu", without: "cpu"}


def test_every_job_of_a_run_has_its_priority_and_the_control_comes_after_its_student(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, recipe={"iterations": {"control": True}}, priority=7)
    play(database)

    with database.reading() as session:
        found = dict(session.execute(sa.select(Job.step, sa.func.min(Job.priority)).where(Job.run_id == run_id).group_by(Job.step)).all())
    assert found == {"train-teacher": 7, "label": 7, "select": 7, "train-student": 7, "train-control": 6}
    database.close()


@pytest.mark.parametrize(("of", "status", "num_iterations"), [("", "stopped early", 1), ("-other", "completed", 2)])
def test_the_stop_rule_compares_only_figures_on_the_same_validation_images(
    database: Database, of: str, status: str, num_iterations: int
) -> None:
    iterations = {"control": False, "min_validation_gain": 0.0}
    first = add_run(database, iterations=0, recipe={"iterations": iterations})
    play(database, top1=[0.9])
    with database.reading() as session:
        generation_id = list_iterations(session, first)[0].generation_id
    second = add_run(database, iterations=2, recipe={"iterations": iterations}, initial=generation_id, of=of or None)

    play(database, top1=[0.5, 0.6])

    with database.reading() as session:
        run = get_run(session, second)
        assert len(list_iterations(session, second)) == 1 + num_iterations
        assert run.stop_reason == ("validation.gain" if status == "stopped early" else "iterations.done")


def test_a_run_goes_through_every_step_of_every_iteration_and_completes(database: Database) -> None:
    run_id = add_run(database, iterations=2)

    steps = play(database)

    assert steps == ["train-teacher", *ITERATION, *ITERATION]
    run = read_run(database, run_id)
    assert (run.status, run.stop_reason) == ("completed", "iterations.done")
    with database.reading() as session:
        zero, one, two = list_iterations(session, run_id)
        assert {row.phase for row in (zero, one, two)} == {"done"}
        assert (one.teacher_generation_id, two.teacher_generation_id) == (zero.generation_id, one.generation_id)
        assert get_set(session, two.pseudo_label_set_id or "").status == "ready"


def test_the_control_belongs_to_the_iteration(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, recipe={"iterations": {"control": True}})

    steps = play(database)

    assert steps == ["train-teacher", *ITERATION, "train-control"]
    with database.reading() as session:
        [_, one] = list_iterations(session, run_id)
    assert one.phase == "done"
    assert None not in (one.generation_id, one.control_generation_id)
    database.close()


def test_an_iteration_whose_student_is_exported_is_in_training_while_its_control_is(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, recipe={"iterations": {"control": True}})
    while finish_next(database) != "select":
        advance_all(database)
    advance_all(database)
    with database.transaction() as session:
        student = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert student is not None
        assert student.step == "train-student"
        jobs.set_phase(session, student, "exporting")
        made, files = result_of(student, top1=0.5)
        record_success(session, student, made, files, {})

    with database.reading() as session:
        assert list_iterations(session, run_id)[1].phase == "training"
    database.close()


def test_a_run_stops_when_validation_gains_too_little(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, iterations=5, recipe={"iterations": {"min_validation_gain": 0.01, "control": False}})

    steps = play(database, top1=[0.5, 0.6, 0.6])

    assert steps.count("train-student") == 2
    assert read_run(database, run_id).stop_reason == "validation.gain"
    database.close()


def test_a_manual_run_waits_after_generation_0(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, iterations=0)

    assert play(database) == ["train-teacher"]
    assert read_run(database, run_id).status == "completed"
    database.close()


def test_a_failed_job_fails_its_run_with_what_the_job_said(database: Database) -> None:
    run_id = add_run(database)
    finish_next(database)
    advance_all(database)
    for _ in range(3):
        finish_next(database)
    advance_all(database)

    job_id = fail_next(database, code="selection.nothing_selected", message="none survives", details={"histogram": {"cat": [1]}})
    advance_all(database)

    run = read_run(database, run_id)
    assert run.status == "failed"
    assert run.error == {
        "job_id": job_id,
        "code": "selection.nothing_selected",
        "message": "none survives",
        "details": {"histogram": {"cat": [1]}},
    }
    with database.reading() as session:
        [_, one] = list_iterations(session, run_id)
        assert one.phase == "failed"
        assert get_set(session, one.pseudo_label_set_id or "").status == "failed"


def test_one_canceled_job_ends_its_run_but_a_retry_goes_on(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database, iterations=0)
    with database.transaction() as session:
        [job_id] = session.scalars(sa.select(Job.id))
        jobs.request_cancel(session, job_id)
    advance_all(database)
    assert (read_run(database, run_id).error or {})["code"] == "job.canceled"

    with database.transaction() as session:
        jobs.retry(session, job_id)
        move_run(session, run_id, "active")
        list_iterations(session, run_id)[0].phase = "training"
    play(database)

    assert read_run(database, run_id).status == "completed"
    database.close()


def test_a_run_that_cannot_go_on_fails_alone(database: Database) -> None:
    bad, good = add_run(database, of="-bad"), add_run(database, of="-good")
    while finish_next(database) is not None:
        pass
    with database.transaction() as session:
        row = get_run(session, bad)
        row.recipe = {**row.recipe, "labelling": {}}

    advance_all(database)

    assert read_run(database, bad).status == "failed"
    error = read_run(database, bad).error or {}
    assert error["code"] == "run.cannot_go_on"
    assert "labelling" in error["message"]
    assert finish_next(database) == "label"
    assert read_run(database, good).status == "active"


def test_a_run_that_the_database_refuses_to_move_does_not_hold_the_others(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = add_run(database, of="-bad"), add_run(database, of="-good")
    while finish_next(database) is not None:
        pass
    move_on = controller._move_on

    def refuse(database: Database, run_id: str) -> bool:
        if run_id == bad:
            raise sa.exc.IntegrityError("INSERT", {}, Exception("a constraint"))
        return move_on(database, run_id)

    monkeypatch.setattr(controller, "_move_on", refuse)

    advance_all(database)

    with database.reading() as session:
        labeled = set(session.scalars(sa.select(Job.run_id).where(Job.kind == "label")))
    assert labeled == {good}
    assert read_run(database, bad).status == "active"


def test_a_paused_run_stands_still(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    run_id = add_run(database)
    finish_next(database)
    with database.transaction() as session:
        move_run(session, run_id, "paused")

    assert play(database) == []

    with database.transaction() as session:
        move_run(session, run_id, "active")
    assert play(database) == ITERATION
    database.close()


def test_controllers_at_one_moment_make_each_job_once(database: Database) -> None:
    run_id = add_run(database)
    finish_next(database)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: advance_run(database, run_id), range(12)))

    with database.reading() as session:
        steps = list(session.scalars(sa.select(Job.step).where(Job.run_id == run_id).order_by(Job.id)))
    assert steps == ["train-teacher", "label", "label", "label"]


@pytest.mark.parametrize(
    ("facts", "move"),
    [
        (Facts(run_status="active", number=0, phase="training", jobs={"train-teacher": {"running": 1}}), None),
        (Facts(run_status="active", number=0, phase="training", jobs={"train-teacher": {"succeeded": 1}}), "finish"),
        (Facts(run_status="active", number=0, phase="done"), "next"),
        (Facts(run_status="paused", number=0, phase="done"), None),
        (Facts(run_status="active", number=1, phase="failed", jobs={"label": {"failed": 1}}), None),
        (
            Facts(run_status="active", number=1, phase="labeling", set_status="labeling", jobs={"label": {"succeeded": 2, "queued": 1}}),
            None,
        ),
        (Facts(run_status="active", number=1, phase="labeling", set_status="labeling", jobs={"label": {"succeeded": 3}}), "select"),
        (
            Facts(run_status="active", number=1, phase="labeling", set_status="labeling", jobs={"label": {"succeeded": 3, "failed": 1}}),
            "fail",
        ),
        (Facts(run_status="active", number=1, phase="selecting", set_status="selecting", jobs={"label": {"succeeded": 3}}), None),
        (Facts(run_status="active", number=1, phase="selecting", set_status="ready", jobs={"select": {"succeeded": 1}}), "train"),
        (
            Facts(
                run_status="active", number=1, phase="training", set_status="ready", control=True, jobs={"train-student": {"succeeded": 1}}
            ),
            None,
        ),
    ],
)
def test_the_next_move_is_a_function_of_the_counts(facts: Facts, move: str | None) -> None:
    assert decide(facts) == move


def test_a_set_of_its_own_moves_by_its_counts() -> None:
    assert decide_set("labeling", {"label": {"succeeded": 2}}) == "select"
    assert decide_set("labeling", {"label": {"succeeded": 2, "running": 1}}) is None
    assert decide_set("selecting", {"label": {"succeeded": 2}, "select": {"canceled": 1}}) == "fail"
    assert decide_set("ready", {"label": {"succeeded": 2}}) is None
