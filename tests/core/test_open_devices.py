"""A run that leaves its device open: where its jobs wait when the workers that it was to run on are gone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from core.db.events import list_job_events
from core.db.runs import get_run, move_to_offered_devices
from core.db.session import Database, now
from core.db.tables import Job, OutboxMessage, Worker
from core.db.workers import WorkerDescription, drain_worker, register_worker
from tests.workers.test_controller import add_run

AUTO: dict[str, Any] = {"runtime": {"device": "auto"}}


def add_worker(database: Database, *capabilities: str) -> str:
    with database.transaction() as session:
        described: dict[str, Any] = {"host": "h", "boot_id": "b", "pid": 1, "slots": 1, "version": "0"}
        return register_worker(session, WorkerDescription(name=f"w-{'-'.join(capabilities)}", capabilities=capabilities, **described)).id


def let_pass(database: Database, seconds: float, *worker_ids: str) -> None:
    """Everything there is becomes older, and these workers were not seen since."""
    with database.transaction() as session:
        past = now(session) - timedelta(seconds=seconds)
        session.execute(sa.update(Job).values(created_at=past))
        session.execute(sa.update(Worker).where(Worker.id.in_(worker_ids)).values(seen_at=past))


def move(database: Database) -> list[str]:
    with database.transaction() as session:
        return [job.id for job in move_to_offered_devices(session, unseen_seconds=120)]


def capabilities_of(database: Database, run_id: str) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(sa.select(Job.capability).where(Job.run_id == run_id).order_by(Job.id)))


def test_a_first_job_whose_workers_have_vanished_goes_to_those_that_are_there_and_says_so(database: Database) -> None:
    gpu = add_worker(database, "cuda")
    run_id = add_run(database, recipe=AUTO)
    let_pass(database, 121, gpu)
    assert move(database) == []
    add_worker(database, "cpu")

    [job_id] = move(database)

    assert move(database) == []
    assert capabilities_of(database, run_id) == ["cpu"]
    with database.reading() as session:
        last = list_job_events(session, job_id, after=0, limit=10)[-1]
        hints = session.scalars(sa.select(OutboxMessage.queue).where(OutboxMessage.job_id == job_id).order_by(OutboxMessage.id)).all()
    assert (last.kind, last.data["from"], last.data["to"]) == ("moved", "cuda", "cpu")
    assert "no worker has taken jobs with capability cuda for 120 seconds" in last.data["reason"]
    assert hints == ["cuda", "cpu"]


def test_a_run_waits_for_a_worker_that_was_there_a_moment_ago_or_is_started_again(database: Database) -> None:
    gpu = add_worker(database, "cuda")
    add_run(database, recipe=AUTO)
    add_worker(database, "cpu")
    let_pass(database, 100, gpu)

    assert move(database) == []


def test_a_worker_that_drains_for_long_is_waited_for_no_more(database: Database) -> None:
    gpu = add_worker(database, "cuda")
    run_id = add_run(database, recipe=AUTO)
    add_worker(database, "cpu")
    let_pass(database, 200)
    with database.transaction() as session:
        drain_worker(session, gpu)
    assert move(database) == []

    with database.transaction() as session:
        session.get_one(Worker, gpu).draining_at = now(session) - timedelta(seconds=121)

    assert len(move(database)) == 1
    assert capabilities_of(database, run_id) == ["cpu"]


def test_what_a_recipe_or_a_first_job_has_fixed_stays_where_it_is(database: Database) -> None:
    gpu = add_worker(database, "cuda")
    asked = add_run(database, recipe={"runtime": {"device": "cuda"}}, of="-asked")
    recorded = add_run(database, recipe=AUTO, of="-recorded")
    with database.transaction() as session:
        run = get_run(session, recorded)
        run.runtime = {**run.recipe["runtime"], "device": "cuda"}
    add_worker(database, "cpu")
    let_pass(database, 200, gpu)

    assert move(database) == []
    assert capabilities_of(database, asked) + capabilities_of(database, recorded) == ["cuda", "cuda"]


def test_jobs_that_were_queued_before_the_runtime_was_recorded_follow_it(database: Database) -> None:
    add_worker(database, "cuda")
    run_id = add_run(database, recipe=AUTO)
    with database.transaction() as session:
        run = get_run(session, run_id)
        run.runtime = {**run.recipe["runtime"], "device": "cpu"}

    assert len(move(database)) == 1
    assert capabilities_of(database, run_id) == ["cpu"]
