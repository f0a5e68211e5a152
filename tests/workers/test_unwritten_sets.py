"""A set of many shards is written down in slices, and counts as labeled only when all of its shards are."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from core.db import jobs, pseudo_labels
from core.db.pseudo_labels import HELD_UNTIL, cancel_set, get_set, list_unwritten_sets, write_next_jobs
from core.db.session import Database
from core.db.tables import Event, Job
from tests.workers.builders_reuse import add_generation, add_pool, new_number, shards_of, start_set
from tests.workers.test_controller import add_run, finish_next, play, read_run
from workers import controller

FILE = {"digest": "0" * 64, "num_bytes": 1}


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SLICE", 3)
    monkeypatch.setattr(pseudo_labels, "SLICE", 3)


def add_set(database: Database, *, shards: int, **values: Any) -> str:
    teacher = add_generation(database, {"model.safetensors": FILE}, ["cat", "dog"])
    pool = add_pool(database, FILE, 4 * shards, name=f"pool-{new_number()}")
    return start_set(database, teacher, pool, num_images=4 * shards, **values)


def label_what_waits(database: Database) -> int:
    """Every shard that a worker can have; how many."""
    count = 0
    with database.transaction() as session:
        while (job := jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)) is not None:
            assert job.kind == "label"
            assert jobs.succeed(session, job.id, token=job.token, result={}) is not None
            count += 1
    return count


def read_places(database: Database, set_id: str) -> list[tuple[str, int]]:
    return sorted((job.input["purpose"], job.input["start"]) for job in shards_of(database, set_id))


def test_a_large_set_is_written_in_slices_and_each_shard_once(database: Database) -> None:
    set_id = add_set(database, shards=10)
    assert len(shards_of(database, set_id)) == 4

    controller.write_jobs(database)

    assert read_places(database, set_id) == [("label", 4 * place) for place in range(10)]
    assert label_what_waits(database) == 10
    with database.reading() as session:
        assert list_unwritten_sets(session) == []


def test_a_small_set_is_whole_at_once(database: Database) -> None:
    set_id = add_set(database, shards=3)

    assert read_places(database, set_id) == [("label", 0), ("label", 4), ("label", 8)]
    assert label_what_waits(database) == 3


def test_a_separate_selection_models_shards_are_written_too(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    chooser = add_generation(database, {"model.safetensors": FILE}, ["cat", "dog"])
    set_id = add_set(database, shards=4, selection_generation_id=chooser)

    controller.write_jobs(database)

    assert read_places(database, set_id) == [(purpose, 4 * place) for purpose in ("label", "select") for place in range(4)]
    database.close()


def test_nothing_is_selected_before_every_shard_is_written_and_labeled(database: Database) -> None:
    set_id = add_set(database, shards=8)

    # The first slice is labeled, and the controller of another worker, which may be older, looks before more is written.
    assert label_what_waits(database) == 3
    assert not controller.advance_set(database, set_id)
    labeled = 3
    while labeled < 8:
        with database.transaction() as session:
            write_next_jobs(session, set_id)
        labeled += label_what_waits(database)
        assert controller.advance_set(database, set_id) == (labeled == 8)

    with database.reading() as session:
        assert get_set(session, set_id).status == "selecting"


def test_a_runs_set_is_written_in_slices_and_the_run_goes_on_to_its_end(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SLICE", 1)
    monkeypatch.setattr(pseudo_labels, "SLICE", 1)
    run_id = add_run(database)

    steps = play(database)

    assert steps == ["train-teacher", "label", "label", "label", "select", "train-student"]
    with database.reading() as session:
        parts = sa.select(Job.part).where(Job.run_id == run_id, Job.step == "label").order_by(Job.part)
        assert list(session.scalars(parts)) == [0, 1, 2]
    assert read_run(database, run_id).status == "completed"


def test_a_set_canceled_halfway_is_written_no_further_and_leaves_no_job_open(database: Database) -> None:
    set_id = add_set(database, shards=10)
    with database.transaction() as session:
        write_next_jobs(session, set_id)
        running = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert running is not None

    with database.transaction() as session:
        cancel_set(session, set_id)
    controller.advance_all(database)

    with database.reading() as session:
        found = session.execute(sa.select(Job.id, Job.status, Job.num_events).where(Job.pseudo_label_set_id == set_id)).all()
        assert {(job_id == running.id, status) for job_id, status, _ in found} == {(True, "running"), (False, "canceled")}
        assert len(found) == 7
        assert list_unwritten_sets(session) == []
        for job_id, status, num_events in found:
            kinds = list(session.scalars(sa.select(Event.kind).where(Event.job_id == job_id).order_by(Event.number)))
            assert kinds == (["queued", "started", "cancel_requested"] if status == "running" else ["queued", "canceled"])
            assert num_events == len(kinds)


def test_a_held_shard_that_was_canceled_and_tried_again_does_not_stand_for_the_missing_ones(database: Database) -> None:
    set_id = add_set(database, shards=8)
    with database.transaction() as session:
        held_id = get_set(session, set_id).held_job_id or ""
        jobs.request_cancel(session, held_id)
    assert controller.advance_set(database, set_id)
    with database.transaction() as session:
        get_set(session, set_id).status = "labeling"
        jobs.retry(session, held_id)

    assert label_what_waits(database) == 4
    assert not controller.advance_set(database, set_id)
    controller.write_jobs(database)

    assert read_places(database, set_id) == [("label", 4 * place) for place in range(8)]
    assert label_what_waits(database) == 4
    assert controller.advance_set(database, set_id)


def test_on_the_slowest_database_a_turn_writes_a_slice(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "WRITING_SECONDS", 0.0)
    set_id = add_set(database, shards=8)

    written = []
    for _ in range(2):
        controller.write_jobs(database)
        written.append(len(shards_of(database, set_id)))

    assert written == [7, 8]


def spoil(database: Database, set_id: str) -> None:
    """As a set that a newer version wrote."""
    with database.transaction() as session:
        get_set(session, set_id).labeling = {}


def test_a_set_of_its_own_that_cannot_be_written_fails(database: Database) -> None:
    set_id = add_set(database, shards=8)
    spoil(database, set_id)

    controller.write_jobs(database)

    with database.reading() as session:
        assert get_set(session, set_id).status == "failed"
        assert list_unwritten_sets(session) == []


def test_a_run_whose_set_cannot_be_written_fails_and_says_so_and_its_set_waits(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SLICE", 1)
    monkeypatch.setattr(pseudo_labels, "SLICE", 1)
    run_id = add_run(database)
    finish_next(database)
    assert controller.advance_run(database, run_id)
    with database.reading() as session:
        [set_id] = list_unwritten_sets(session)
    spoil(database, set_id)

    controller.write_jobs(database)

    run = read_run(database, run_id)
    assert (run.status, (run.error or {})["code"]) == ("failed", "run.cannot_go_on")
    with database.reading() as session:
        assert get_set(session, set_id).status == "labeling"
        assert list_unwritten_sets(session) == []


def test_the_held_shard_goes_where_its_set_goes(sqlite_url: str) -> None:
    """What is written later waits for the same capability as the one that was moved."""
    database = Database(sqlite_url)
    set_id = add_set(database, shards=8)
    with database.transaction() as session:
        session.execute(sa.update(Job).where(Job.not_before == HELD_UNTIL).values(capability="cuda"))

    controller.write_jobs(database)

    assert [job.capability for job in shards_of(database, set_id)].count("cuda") == 5
    database.close()
