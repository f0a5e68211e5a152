"""What has ended can be deleted, whole and in one transaction; what something else needs cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from cli.verify import find_defects
from core.db import jobs
from core.db.datasets import add_version, create_dataset, get_dataset
from core.db.deletion import delete_dataset, delete_prediction, delete_run, delete_set, delete_version
from core.db.files import name_files
from core.db.generations import delete_generation
from core.db.pseudo_labels import cancel_set
from core.db.runs import get_run, move_run
from core.db.session import Database
from core.db.tables import Base, DatasetVersion, Event, Generation, Iteration, Job, OutboxMessage, PseudoLabelSet, Run, StoredFile
from core.errors import NotFound, StillReferenced, WrongState
from core.settings import Settings
from tests.builders_histories import Histories
from workers.garbage import collect

OF_HISTORIES = (Run, Iteration, PseudoLabelSet, Generation, Job, Event, StoredFile, DatasetVersion, OutboxMessage)


@pytest.fixture
def histories(database: Database, tmp_path: Path) -> Histories:
    return Histories(database, tmp_path)


def refusal(histories: Histories, run_id: str) -> list[str]:
    """Who needs the run."""
    with pytest.raises(StillReferenced) as refused, histories.database.transaction() as session:
        delete_run(session, run_id)
    found: list[str] = refused.value.details["referrers"]
    return found


def test_a_run_goes_with_everything_that_it_made_and_nothing_else(histories: Histories) -> None:
    other = histories.make_run()
    before = {table: histories.count(table) for table in OF_HISTORIES}
    run_id = histories.make_run(iterations=2)
    made = set(histories.ids(Generation, Generation.run_id == run_id))

    with histories.database.transaction() as session:
        gone = delete_run(session, run_id)

    assert set(gone) == made
    assert len(made) == 5
    # Its two datasets stay, with a manifest each.
    datasets = {DatasetVersion: 2, StoredFile: 2}
    assert {table: histories.count(table) for table in OF_HISTORIES} == {
        table: count + datasets.get(table, 0) for table, count in before.items()
    }
    with histories.database.reading() as session:
        assert get_run(session, other).status == "completed"


@pytest.mark.parametrize("status", ["active", "paused"])
def test_a_run_that_has_not_ended_stays(histories: Histories, status: str) -> None:
    run_id = histories.start_run()
    with histories.database.transaction() as session:
        move_run(session, run_id, status)

    with pytest.raises(WrongState, match=f"is {status}"), histories.database.transaction() as session:
        delete_run(session, run_id)

    assert histories.count(Run) == 1


def test_a_canceled_run_stays_until_its_last_attempt_has_stopped(histories: Histories) -> None:
    run_id = histories.start_run()
    job = histories.claim()
    assert job is not None
    with histories.database.transaction() as session:
        move_run(session, run_id, "canceled")
        jobs.request_cancel(session, job.id)

    with pytest.raises(WrongState, match="still being stopped"), histories.database.transaction() as session:
        delete_run(session, run_id)
    with histories.database.transaction() as session:
        jobs.cancel_held(session, job.id, token=job.token)
        delete_run(session, run_id)

    assert histories.count(Job) == 0


def test_a_worker_that_comes_back_after_its_job_was_deleted_is_fenced(histories: Histories) -> None:
    job_id = histories.start_prediction("gen_x", "dsv_x")
    job = histories.claim()
    assert job is not None
    with histories.database.transaction() as session:
        jobs.fail(session, job_id, token=job.token, error={"class": "permanent", "code": "x", "message": "x"}, backoff_seconds=0)
        delete_prediction(session, job_id)

    with histories.database.transaction() as session:
        ends = (
            jobs.heartbeat(session, job_id, token=job.token, lease_seconds=1, progress=None),
            jobs.succeed(session, job_id, token=job.token, result={}),
            jobs.fail(session, job_id, token=job.token, error={"class": "retryable", "code": "x", "message": "x"}, backoff_seconds=0),
            jobs.interrupt(session, job_id, token=job.token, reason="x"),
        )

    assert ends == (None, None, None, None)


def promote(histories: Histories, run_id: str) -> str:
    histories.promote(histories.students(run_id)[1])
    return "alias production"


def promote_and_replace(histories: Histories, run_id: str) -> str:
    histories.promote(histories.students(run_id)[1])
    histories.promote(histories.make_import())
    return "history of alias production"


def begin_with(histories: Histories, run_id: str) -> str:
    return f"run {histories.start_run(iterations=0, initial=histories.students(run_id)[-1])}"


def label_with(histories: Histories, run_id: str) -> str:
    version = histories.add_version("pool", "unlabeled")
    return f"pseudo-label set {histories.start_set(histories.students(run_id)[0], version.id)}"


def predict_with(histories: Histories, run_id: str) -> str:
    return f"job {histories.start_prediction(histories.students(run_id)[0], 'dsv_x')}"


def write_into_a_recipe(histories: Histories, run_id: str) -> str:
    weights = f"generation:{histories.students(run_id)[1]}"
    return f"run {histories.start_run(recipe={'teacher': {'network': {'initial_weights': weights}}})}"


REFERRERS: dict[str, Callable[[Histories, str], str]] = {
    "an alias": promote,
    "the history of an alias": promote_and_replace,
    "another run's first generation": begin_with,
    "a set of its own": label_with,
    "a batch prediction": predict_with,
    "an open run's recipe": write_into_a_recipe,
}


@pytest.mark.parametrize("name", REFERRERS)
def test_what_needs_one_of_its_generations_keeps_a_run(histories: Histories, name: str) -> None:
    run_id = histories.make_run()

    referrer = REFERRERS[name](histories, run_id)

    assert referrer in refusal(histories, run_id)
    assert histories.count(Generation, Generation.run_id == run_id) == 3


def test_a_student_of_another_run_keeps_its_teachers_run(histories: Histories) -> None:
    first = histories.make_run()
    second = histories.make_run(initial=histories.students(first)[-1])
    student = histories.students(second)[1]

    assert {f"run {second}", f"generation {student}"} <= set(refusal(histories, first))
    with histories.database.transaction() as session:
        delete_run(session, second)
        delete_run(session, first)

    assert histories.count(Run) == 0


def test_a_set_of_its_own_goes_with_its_jobs(histories: Histories) -> None:
    generation_id, version = histories.make_import(), histories.add_version("pool", "unlabeled")
    before = {table: histories.count(table) for table in OF_HISTORIES}
    set_id = histories.start_set(generation_id, version.id)
    histories.work()

    with histories.database.transaction() as session:
        delete_set(session, set_id)

    assert {table: histories.count(table) for table in OF_HISTORIES} == before


def test_a_set_that_is_still_made_stays_until_it_is_canceled(histories: Histories) -> None:
    set_id = histories.start_set(histories.make_import(), histories.add_version("pool", "unlabeled").id)
    with pytest.raises(WrongState, match="is labeling"), histories.database.transaction() as session:
        delete_set(session, set_id)

    with histories.database.transaction() as session:
        cancel_set(session, set_id)
        assert cancel_set(session, set_id).status == "canceled"
        delete_set(session, set_id)

    assert histories.count(Job, Job.kind == "label") == 0


def test_a_set_of_a_run_goes_with_the_run(histories: Histories) -> None:
    run_id = histories.make_run()
    [set_id] = histories.ids(PseudoLabelSet)

    with pytest.raises(StillReferenced, match=f"run {run_id}"), histories.database.transaction() as session:
        delete_set(session, set_id)


def test_a_version_stays_while_a_run_a_set_or_what_was_cut_from_it_needs_it(histories: Histories) -> None:
    pool, kept_out = histories.add_version("pool", "unlabeled"), histories.add_version("kept-out", "evaluation")
    source = histories.add_version("source", "labeled")
    part = histories.add_version("part", "labeled", split_of=source.id, part="labeled")
    generation_id = histories.make_import()
    set_id = histories.start_set(generation_id, pool.id, evaluation=[kept_out.id])
    histories.work()

    for version, referrer in (
        (pool, f"pseudo-label set {set_id}"),
        (kept_out, f"pseudo-label set {set_id}"),
        (source, f"version {part.id}"),
    ):
        with pytest.raises(StillReferenced, match=referrer), histories.database.transaction() as session:
            delete_version(session, version.id)
    with histories.database.transaction() as session:
        delete_set(session, set_id)
        for version in (pool, kept_out, part, source):
            delete_version(session, version.id)

    assert histories.count(DatasetVersion) == 0


def test_a_version_that_is_being_read_stays(histories: Histories) -> None:
    with histories.database.transaction() as session:
        version, job = add_version(session, create_dataset(session, name="photos", kind="labeled"), source={"folder": "/data"})
    assert job is not None

    with pytest.raises(StillReferenced, match=f"job {job.id}"), histories.database.transaction() as session:
        delete_version(session, version.id)


def test_whatever_files_a_version_names_go_with_it_and_its_number_is_not_given_again(histories: Histories) -> None:
    version = histories.add_version("photos", "labeled")
    with histories.database.transaction() as session:
        name_files(session, version.id, {"images/00000.tar": histories.store(), "images/00001.tar": histories.store()})
        delete_version(session, version.id)
        following, _ = add_version(session, get_dataset(session, "photos"), source={"folder": "/data"}, ingest=False)

    assert following.number == 2
    assert histories.names() == set()


def test_a_split_keeps_its_history_until_the_last_of_its_parts_goes(histories: Histories) -> None:
    parts = [histories.add_version(name, "labeled") for name in ("one", "two")]
    with histories.database.transaction() as session:
        [job] = jobs.enqueue(session, [jobs.NewJob(kind="split", input={})])
        session.execute(sa.update(DatasetVersion).values(job_id=job.id))
        session.execute(sa.update(Job).values(status="succeeded"))

    left = []
    for part in parts:
        with histories.database.transaction() as session:
            delete_version(session, part.id)
        left.append(histories.count(Job))

    assert left == [1, 0]


def test_a_dataset_goes_with_all_its_versions_or_not_at_all(histories: Histories) -> None:
    run_id = histories.make_run(iterations=0)
    with histories.database.reading() as session:
        name = get_run(session, run_id).name + "-labeled"
    with pytest.raises(StillReferenced, match=f"run {run_id}"), histories.database.transaction() as session:
        delete_dataset(session, name)

    with histories.database.transaction() as session:
        delete_run(session, run_id)
        delete_dataset(session, name)

    with pytest.raises(NotFound), histories.database.reading() as session:
        get_dataset(session, name)


def test_after_everything_was_deleted_nothing_is_wrong_and_no_file_is_left(histories: Histories, tmp_path: Path) -> None:
    generation_id = histories.make_import()
    run_id = histories.make_run(iterations=2, initial=generation_id)
    pool = histories.add_version("pool", "unlabeled")
    set_id = histories.start_set(histories.students(run_id)[-1], pool.id)
    prediction = histories.start_prediction(generation_id, pool.id)
    histories.work()
    histories.age(days=1)
    settings = Settings(data_directory=tmp_path / "data")

    with histories.database.transaction() as session:
        delete_set(session, set_id)
        delete_prediction(session, prediction)
        delete_run(session, run_id)
        delete_generation(session, generation_id)
        for version_id in session.scalars(sa.select(DatasetVersion.id)).all():
            delete_version(session, version_id)
    halfway = find_defects(histories.database, histories.storage, orphan_seconds=10**6)
    collect(histories.database, histories.storage, settings)

    assert halfway == []
    assert find_defects(histories.database, histories.storage, orphan_seconds=0) == []
    # The import's own history and log stay, as those of a job that made something.
    assert histories.count(Job) == 1
    assert len(histories.stored()) == 1
    empty = [
        table.name for table in Base.metadata.sorted_tables if table.name in ("runs", "generations", "pseudo_label_sets", "iterations")
    ]
    with histories.database.reading() as session:
        assert [session.scalar(sa.select(sa.func.count()).select_from(Base.metadata.tables[name])) for name in empty] == [0, 0, 0, 0]
