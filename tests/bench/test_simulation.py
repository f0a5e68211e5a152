"""`make simulate` in small: the same code over 40 shards, and what its figures and its oracle say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.service import Service
from bench.simulate import simulate
from bench.simulation.fates import SURE_ATTEMPT, count_fates, fate_of, fates_of
from bench.simulation.hints import Hint
from bench.simulation.oracle import find_faults, list_jobs
from bench.simulation.plan import Notes, Plan, Shared
from bench.simulation.plots import draw
from bench.simulation.scene import Scene, add_run
from bench.simulation.story import Story, growth
from core.db.session import Database
from core.queue import TASK_NAME, make_celery
from core.settings import Settings

TINY = Plan(
    shards=40,
    workers=6,
    processes=1,
    work_seconds=0.1,
    lease_seconds=2.0,
    report_seconds=0.3,
    poll_seconds=1.0,
    restart_seconds=0.2,
    calm_seconds=0.5,
    limit_seconds=90.0,
)


def test_a_small_simulation_loses_and_doubles_nothing_and_is_drawn(tmp_path: Path) -> None:
    story = simulate(TINY)

    assert story.faults == []
    fates = count_fates(TINY.seed, list_jobs(TINY.shards))
    assert min(fates["dies"], fates["freezes"], fates["repeats"]) >= 1, "this seed must show every kind of loss"
    assert story.notes.counts["messages"] >= TINY.shards / 2
    assert len(story.times("follow")) == TINY.shards + 3
    pictures = draw([story], tmp_path)
    assert [path.stat().st_size > 1000 for path in pictures] == [True, True, True]


def test_the_seed_says_what_befalls_every_attempt() -> None:
    jobs = list_jobs(2000)

    assert count_fates(3, jobs) == count_fates(3, jobs) != count_fates(4, jobs)
    assert {fate_of(3, "label", part, SURE_ATTEMPT).is_lost for part in range(2000)} == {False}
    assert all([fate.is_lost for fate in fates_of(3, *job)] == [True] * (len(fates_of(3, *job)) - 1) + [False] for job in jobs)


def test_the_oracle_misses_no_job_and_no_count(sqlite_url: str, tmp_path: Path) -> None:
    settings = Settings(database_url=sqlite_url, data_directory=tmp_path)
    shared = Shared(plan=TINY, settings=settings, directory=tmp_path, stored={"digest": "0" * 64, "num_bytes": 1})
    database = Database(sqlite_url)
    service = Service(tmp_path, 0, {})
    scene = Scene(shared=shared, service=service, database=database, run_id=add_run(database, TINY, shared.stored))

    faults = find_faults(scene, Notes(errors=["a worker stumbled"]))

    database.close()
    assert "a worker stumbled" in faults
    assert "job ('label', 39) is missing" in faults
    assert any(fault.startswith("train-teacher 0: ") and "'queued'" in fault for fault in faults)
    assert any(fault.startswith("repeated results fenced: 0, but the seed says") for fault in faults)


def test_a_hint_is_read_as_the_services_own_queue_writes_it(redis_url: str) -> None:
    app = make_celery(redis_url)
    app.send_task(TASK_NAME, args=["job_1"], kwargs={"handed_on": 1}, queue="simulated", retry=False, ignore_result=True)

    with app.connection_for_read() as connection:
        message = connection.default_channel.client.rpop("simulated")
    assert Hint.read(message) == Hint("job_1", 1)


def story_of(shards: int, seconds_per_turn: float) -> Story:
    """A turn and a claim a second; each turn holds a relay of half a second."""
    notes = Notes()
    for at in range(101):
        notes.times += [("turn", at, seconds_per_turn + 0.5), ("relay", at + 0.1, 0.5), ("claim", at, 0.01)]
    progress = [(float(at), at * shards // 100) for at in range(101)]
    return Story(Plan(shards=shards), notes, Notes(), progress, (0.0, 0.0))


def test_growth_is_of_the_controller_alone_and_between_sizes() -> None:
    grown = growth(story_of(100, 0.1), story_of(1000, 0.3))

    assert {name: grown[name] for name in ("controller in a turn", "relay", "claim")} == pytest.approx(
        {"controller in a turn": 3.0, "relay": 1.0, "claim": 1.0}
    )
