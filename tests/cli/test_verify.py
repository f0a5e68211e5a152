"""`doctor --verify`: silent about a healthy service, loud about each invariant that is broken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from cli.verify import Defect, find_defects
from core.db.session import Database
from core.db.tables import Alias, DatasetVersion, Event, Generation, Iteration, Job, Promotion, Run, StoredFile
from core.storage import LocalStorage
from tests.cli.builders import History, command, lead_a_life

Plant = Callable[[Session, History], object]


def teacher_job(history: History) -> sa.ScalarSelect[str]:
    return sa.select(Job.id).where(Job.run_id == history.run_id).scalar_subquery()


def event_of(history: History, kind: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (Event.job_id == teacher_job(history), Event.kind == kind)


def start_with_an_old_token(session: Session, history: History) -> object:
    last = sa.select(sa.func.max(Event.number)).where(*event_of(history, "started")).scalar_subquery()
    changed = sa.update(Event).where(*event_of(history, "started"), Event.number == last)
    return session.execute(changed.values(data={"token": 1}).execution_options(synchronize_session=False))


def go_on_after_the_end(session: Session, history: History) -> object:
    job = session.scalars(sa.select(Job).where(Job.run_id == history.run_id)).one()
    run = session.get_one(Run, history.run_id)
    job.num_events += 1
    run.num_events += 1
    row = {"job_id": job.id, "number": job.num_events, "run_id": run.id, "run_number": run.num_events, "attempt": 2}
    return session.execute(sa.insert(Event).values(**row, kind="started", data={"token": 9}, at=job.created_at))


def remove_a_metric(session: Session, history: History) -> object:
    return session.execute(sa.delete(Event).where(*event_of(history, "metric")).execution_options(synchronize_session=False))


def lose_a_place_in_the_run(session: Session, history: History) -> object:
    events = Event.run_id == history.run_id
    options = {"synchronize_session": False}
    session.execute(sa.update(Event).where(events, Event.run_number == 1).values(run_number=None), execution_options=options)
    # The others close up, one at a time: their numbers are unique.
    numbers = sa.select(Event.run_number).where(events, Event.run_number.is_not(None)).order_by(Event.run_number)
    for number in session.scalars(numbers).all():
        session.execute(sa.update(Event).where(events, Event.run_number == number).values(run_number=number - 1), execution_options=options)
    return session.execute(sa.update(Run).where(Run.id == history.run_id).values(num_events=Run.num_events - 1), execution_options=options)


def forget_the_weights(session: Session, history: History) -> object:
    return session.execute(sa.update(Generation).where(Generation.id == history.teacher_id).values(digest="0" * 64))


def forget_that_the_job_succeeded(session: Session, history: History) -> object:
    return session.execute(sa.update(Job).where(Job.run_id == history.run_id).values(status="failed"))


def lose_the_generation(session: Session, history: History) -> object:
    made = sa.select(Generation.id).where(Generation.name == "second").scalar_subquery()
    moves = sa.update(Job).where(Job.generation_id == made).values(generation_id="gen_lost")
    return session.execute(moves.execution_options(synchronize_session=False))


def teach_an_ancestor(session: Session, history: History) -> object:
    pairs = {history.teacher_id: history.student_id, history.student_id: history.teacher_id}
    for pupil, teacher in pairs.items():
        session.execute(sa.update(Generation).where(Generation.id == pupil).values(teacher_generation_id=teacher))
    return None


def name_a_teacher_that_is_not_there(session: Session, history: History) -> object:
    return session.execute(sa.update(Generation).where(Generation.id == history.student_id).values(teacher_generation_id="gen_gone"))


def finish_an_iteration_without_a_generation(session: Session, history: History) -> object:
    return session.execute(sa.update(Iteration).where(Iteration.run_id == history.run_id).values(generation_id=None))


def move_the_alias_behind_its_history(session: Session, history: History) -> object:
    return session.execute(sa.update(Alias).values(generation_id=history.imported_id))


def roll_back_to_another(session: Session, history: History) -> object:
    return session.execute(sa.update(Promotion).where(Promotion.action == "rollback").values(generation_id=history.imported_id))


def take_a_promotion_out(session: Session, _history: History) -> object:
    return session.execute(sa.delete(Promotion).where(Promotion.version == 2))


def name_another_manifest(session: Session, _history: History) -> object:
    return session.execute(sa.update(DatasetVersion).values(manifest_digest="0" * 64))


def name_a_file_that_is_not_there(session: Session, history: History) -> object:
    return session.execute(sa.insert(StoredFile).values(owner_id=history.run_id, name="lost.txt", digest="a" * 64, num_bytes=1))


def leave_work_in_a_completed_run(session: Session, history: History) -> object:
    job = session.scalars(sa.select(Job).where(Job.run_id == history.run_id)).one()
    copy = {column.name: getattr(job, column.name) for column in Job.__table__.columns}
    changed = {"id": "job_left", "status": "queued", "step": "train-control", "generation_id": None, "num_events": 0, "token": 0}
    return session.execute(sa.insert(Job).values(**copy | changed))


def leave_work_in_a_canceled_run(session: Session, history: History) -> object:
    session.execute(sa.update(Run).where(Run.id == history.run_id).values(status="canceled"))
    return leave_work_in_a_completed_run(session, history)


DEFECTS: dict[str, tuple[Plant, str]] = {
    "a token that does not rise": (start_with_an_old_token, "job histories"),
    "a move after the end": (go_on_after_the_end, "job histories"),
    "a missing event": (remove_a_metric, "event numbers"),
    "an event that its run passes over": (lose_a_place_in_the_run, "event numbers"),
    "other weights than the row says": (forget_the_weights, "generations"),
    "a generation of a failed job": (forget_that_the_job_succeeded, "generations"),
    "a row that its history does not lead to": (forget_that_the_job_succeeded, "job histories"),
    "a success without its generation": (lose_the_generation, "generations"),
    "a cycle in the lineage": (teach_an_ancestor, "lineage"),
    "a teacher that is not there": (name_a_teacher_that_is_not_there, "lineage"),
    "a done iteration without a generation": (finish_an_iteration_without_a_generation, "lineage"),
    "an alias off its history": (move_the_alias_behind_its_history, "aliases"),
    "a rollback to another generation": (roll_back_to_another, "aliases"),
    "a gap in an alias's history": (take_a_promotion_out, "aliases"),
    "a version with another manifest": (name_another_manifest, "files of rows"),
    "a file that is not there": (name_a_file_that_is_not_there, "referenced files"),
    "work left in a completed run": (leave_work_in_a_completed_run, "runs"),
    "work left in a canceled run": (leave_work_in_a_canceled_run, "runs"),
}


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    """The planted defects are the same rows on both databases; the queries run on both in the tests of a healthy service."""
    opened = Database(sqlite_url)
    yield opened
    opened.close()


def find(database: Database, tmp_path: Path) -> list[Defect]:
    return find_defects(database, LocalStorage(tmp_path / "objects"), orphan_seconds=3600)


def test_a_service_that_lost_canceled_retried_and_rolled_back_is_healthy(database: Database, tmp_path: Path) -> None:
    lead_a_life(database, LocalStorage(tmp_path / "objects"), tmp_path)

    assert find(database, tmp_path) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_each_planted_defect_is_found(name: str, sqlite: Database, tmp_path: Path) -> None:
    plant, check = DEFECTS[name]
    history = lead_a_life(sqlite, LocalStorage(tmp_path / "objects"), tmp_path)

    with sqlite.transaction() as session:
        plant(session, history)

    assert check in {defect.check for defect in find(sqlite, tmp_path)}


def test_a_lease_without_a_running_job_is_found(sqlite: Database, tmp_path: Path) -> None:
    history = lead_a_life(sqlite, LocalStorage(tmp_path / "objects"), tmp_path)
    # The tables forbid it, so it takes somebody who switches the constraints off.
    with sqlite.transaction() as session:
        session.execute(sa.text("PRAGMA ignore_check_constraints = ON"))
        session.execute(sa.update(Job).where(Job.run_id == history.run_id).values(lease_holder="worker"))

    found = [defect.check for defect in find(sqlite, tmp_path)]

    assert found.count("leases") == 2


def test_a_stored_file_with_other_content_is_found(database: Database, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    history = lead_a_life(database, storage, tmp_path)
    with database.reading() as session:
        digest = session.get_one(Generation, history.teacher_id).digest
    path = storage.fetch(digest)
    path.chmod(0o644)
    path.write_bytes(b"flipped")

    [defect] = find(database, tmp_path)

    assert defect.check == "referenced files"
    assert history.teacher_id in defect.subject


def test_an_old_file_that_nobody_names_is_found_and_a_young_one_is_not(database: Database, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    lead_a_life(database, storage, tmp_path)
    digests = {}
    for age in ("old", "young"):
        (tmp_path / age).write_text(age, encoding="utf-8")
        digests[age] = storage.put(tmp_path / age)["digest"]
    os.utime(storage.fetch(digests["old"]), (0, 0))

    found = find(database, tmp_path)

    assert [defect.subject for defect in found] == [digests["old"]]


def test_the_command_ends_with_1_and_a_list_when_something_is_broken(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    history = lead_a_life(database, LocalStorage(tmp_path / "data/objects"), tmp_path)
    environment = {"NOISY_STUDENT_DATABASE_URL": sqlite_url, "NOISY_STUDENT_DATA_DIRECTORY": str(tmp_path / "data")}
    healthy = command("doctor", "--verify", directory=tmp_path, **environment)
    with database.transaction() as session:
        forget_the_weights(session, history)
    database.close()

    broken = command("doctor", "--verify", directory=tmp_path, **environment)

    assert (healthy.returncode, broken.returncode) == (0, 1)
    assert "nothing is wrong" in healthy.stdout
    assert history.teacher_id in broken.stdout
