"""What a pool of many shards costs whoever keeps house: a look at its run reads a few rows, and a turn of the relay ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from core.db.datasets import finish_version
from core.db.jobs import NewJob
from core.db.session import Database
from core.db.tables import Job, Run
from core.settings import Settings
from tests.workers.builders import add_jobs
from tests.workers.test_controller import DIGEST, add_run, finish_next
from tests.workers.test_housekeeping import Loud, keep, unpublished
from workers import housekeeping
from workers.controller import advance_run, read_facts

SHARDS = 300


@pytest.fixture
def labeling(postgresql_url: str) -> tuple[Database, str]:
    """A run of which all shards but the last are labeled."""
    database = Database(Settings(database_url=postgresql_url).resolved_database_url)
    run_id = add_run(database)
    with database.transaction() as session:
        pool = session.get_one(Run, run_id).unlabeled_version_id
        facts = DIGEST | {"num_images": 16 * SHARDS, "num_usable": 16 * SHARDS, "class_names": ["cat", "dog"]}
        finish_version(session, pool, manifest=facts, report={})
    assert finish_next(database) == "train-teacher"
    assert advance_run(database, run_id)
    with database.transaction() as session:
        session.execute(sa.update(Job).where(Job.step == "label", Job.part < SHARDS - 1).values(status="succeeded"))
    return database, run_id


def rows_read(database: Database, run_id: str) -> int:
    """Rows of jobs that one look at the run reads."""
    counted = "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables WHERE relname = 'jobs'"
    with database.reading() as session:
        # What this connection did before may be among them.
        before: int = session.scalar(sa.text(counted)) or 0
        read_facts(session, run_id)
        return (session.scalar(sa.text(counted)) or 0) - before


def test_a_look_at_a_run_reads_a_few_rows_of_its_many_jobs(labeling: tuple[Database, str]) -> None:
    database, run_id = labeling

    number = rows_read(database, run_id)

    assert 0 < number <= 10
    database.close()


def test_the_last_shard_of_many_moves_the_run_on(labeling: tuple[Database, str]) -> None:
    database, run_id = labeling
    assert not advance_run(database, run_id)

    assert finish_next(database) == "label"

    assert advance_run(database, run_id)
    with database.reading() as session:
        facts = read_facts(session, run_id)
    assert (facts.set_status, facts.jobs) == ("selecting", {"label": {"succeeded"}, "select": {"queued"}})
    database.close()


class Slow(Loud):
    """A queue on a far host."""

    def publish(self, job_id: str, *, capability: str) -> None:
        super().publish(job_id, capability=capability)
        time.sleep(0.01)


def test_a_turn_of_the_relay_ends_and_the_next_one_goes_on(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "RELAY_TURN_SECONDS", 0.005)
    monkeypatch.setattr(housekeeping, "_BATCH", 2)
    heard: list[str] = []
    house = keep(database, tmp_path, queue=Slow("a", heard))
    add_jobs(database, *(NewJob(kind="ingest", input={}) for _ in range(5)))

    house.relay()
    assert unpublished(database) == 3

    house.relay()
    house.relay()
    assert unpublished(database) == 0
    assert len(heard) == 5
