"""The judgment at the end of a chaos run: silent about a healthy service, loud about what was lost, doubled or damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.datasets import add_version, create_dataset
from core.db.idempotency import remember_answer
from core.db.pseudo_labels import create_set
from core.db.tables import DatasetVersion, Job, Promotion
from core.ids import new_id
from tests.faults.ledger import Accepted, Ledger, Move
from tests.faults.oracle import judge
from tests.faults.stage import Stage, set_up

Plant = Callable[[Session, Ledger], object]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Rows and files without processes."""
    with set_up("sqlite", seed=0, num_workers=0) as opened:
        yield opened


def finish(session: Session, job_id: str) -> None:
    """As a worker would, event by event."""
    claimed = jobs.claim(session, holder="worker", capabilities=["cpu"], lease_seconds=60, job_id=job_id)
    assert claimed is not None
    jobs.report(session, job_id, token=claimed.token, items=[("metric", {"step": 1, "loss": 0.5})])
    jobs.succeed(session, job_id, token=claimed.token, result={})


def accept(session: Session, ledger: Ledger, name: str) -> str:
    """A dataset that was asked for, answered, remembered and read; its job."""
    version, job = add_version(session, create_dataset(session, name=name, kind="labeled"), source={"folder": "/data"})
    assert job is not None
    finish(session, job.id)
    version.status = "ready"
    body = {"id": job.id}
    remember_answer(session, key=name, api_key_id="key_1", fingerprint="f", status_code=202, body=body, location=None)
    ledger.accept(Accepted(name, "ingest", job.id, body))
    ledger.versions_wanted[name] = 1
    return job.id


def lose_a_job(_session: Session, ledger: Ledger) -> object:
    return ledger.accept(Accepted("k", "ingest", "job_gone", {}))


def fail_a_job(session: Session, ledger: Ledger) -> object:
    return session.execute(sa.update(Job).where(Job.id == ledger.accepted[0].id).values(status="failed"))


def do_it_twice(session: Session, ledger: Ledger) -> object:
    job_id = accept(session, Ledger(), "photos-again")
    assert job_id not in {one.id for one in ledger.accepted}
    return job_id


def add_a_version_nobody_asked_for(session: Session, _ledger: Ledger) -> object:
    dataset_id = session.scalars(sa.select(DatasetVersion.dataset_id)).first()
    values = {"id": new_id("dataset_version"), "dataset_id": dataset_id, "number": 99, "status": "failed", "source": {}}
    moment = session.scalars(sa.select(Job.created_at)).first()
    return session.execute(sa.insert(DatasetVersion).values(**values, created_at=moment))


def repeat_a_measurement(session: Session, ledger: Ledger) -> object:
    job = jobs.get_job(session, ledger.accepted[0].id)
    return jobs.append_events(session, job, [("metric", {"step": 1, "loss": 0.5})], at=job.created_at)


def remember_another_answer(session: Session, ledger: Ledger) -> object:
    ledger.accepted[0].id = accept(session, Ledger(), "other")
    return None


def forget_a_promotion(session: Session, ledger: Ledger) -> object:
    assert session.scalars(sa.select(Promotion)).first() is None
    return ledger.moves.append(Move(1, "gen_1"))


def label_nothing(session: Session, ledger: Ledger) -> object:
    generation_id = session.execute(sa.text("SELECT id FROM generations")).scalar_one()
    version_id = session.scalars(sa.select(DatasetVersion.id)).first()
    assert version_id is not None
    row = create_set(
        session,
        generation_id=generation_id,
        unlabeled_version_id=version_id,
        num_images=0,
        labeling={"shard_size": 8},
        selection={},
        seed=0,
        capability="cpu",
        runtime={},
        evaluation_version_ids=[],
    )
    row.status, row.num_images = "ready", 24
    return ledger.accept(Accepted("s", "set", row.id, {}))


DEFECTS: dict[str, tuple[Plant, str, str]] = {
    "an accepted job that is not there": (lose_a_job, "lost", "is not there"),
    "an accepted job that failed": (fail_a_job, "lost", "ended as failed"),
    "an effect that nobody was told of": (do_it_twice, "doubled", "nobody asked for it"),
    "a version too many": (add_a_version_nobody_asked_for, "doubled", "were asked for"),
    "a measurement told twice": (repeat_a_measurement, "doubled", "2 times the metric"),
    "a key with another answer": (remember_another_answer, "doubled", "is remembered with"),
    "an answered promotion without history": (forget_a_promotion, "lost", "was answered, the history has None"),
    "a set without its shards": (label_nothing, "doubled", "labels 0 of 24 images"),
}


def verdict_after(stage: Stage, plant: Plant | None) -> dict[str, list[str]]:
    """Of a healthy service in which something was planted."""
    ledger = Ledger()
    stage.add_generation("imported")
    with stage.database.transaction() as session:
        known = set(session.scalars(sa.select(Job.id)))
        accept(session, ledger, "photos")
        if plant is not None:
            plant(session, ledger)
    verdict = judge(stage, ledger, known_jobs=known)
    return {"lost": verdict.lost, "doubled": verdict.doubled, "broken": verdict.broken}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_planted_defect_is_found(name: str) -> None:
    plant, where, words = DEFECTS[name]

    with set_up("sqlite", seed=0, num_workers=0) as stage:
        verdict = verdict_after(stage, plant)

    assert any(words in problem for problem in verdict[where]), verdict


def test_a_healthy_service_has_no_defect() -> None:
    with set_up("sqlite", seed=0, num_workers=0) as stage:
        verdict = verdict_after(stage, None)

    # The version was never really read, so its manifest is missing; nothing else may be.
    assert (verdict["lost"], verdict["doubled"]) == ([], [])


def test_what_the_load_complained_of_is_broken(stage: Stage) -> None:
    ledger = Ledger()
    ledger.complain("/predict answered red in the name of nobody")

    verdict = judge(stage, ledger, known_jobs=set())

    assert verdict.broken == ["/predict answered red in the name of nobody"]
    assert not verdict.is_clean
