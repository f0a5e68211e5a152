"""What goes by itself when it is old, and that nothing else ever does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.verify import find_defects
from core.db import jobs
from core.db.deletion import delete_run
from core.db.files import name_files
from core.db.idempotency import remember_answer
from core.db.retention import RULES, expire, measure_kept
from core.db.runs import move_run
from core.db.session import Database
from core.db.tables import Alias, Generation, IdempotencyRecord, Job, Promotion, PseudoLabelSet, Run, StoredFile, Worker
from core.db.workers import WorkerDescription, hold_singleton, register_worker
from core.settings import Settings
from tests.builders_histories import NUM_SHARDS, Histories
from workers.garbage import BACKUP, Collected, collect

EAGER: dict[str, Any] = {"keep_shards_days": 2, "keep_items_days": 2, "keep_predictions_days": 2, "keep_checkpoints_days": 2}


@pytest.fixture
def histories(database: Database, tmp_path: Path) -> Histories:
    return Histories(database, tmp_path)


@pytest.fixture
def sqlite(sqlite_url: str, tmp_path: Path) -> Histories:
    return Histories(Database(sqlite_url), tmp_path)


def sweep(histories: Histories, *, dry_run: bool = False, **values: Any) -> Collected:
    options = Settings(data_directory=histories.directory / "data", **values)
    return collect(histories.database, histories.storage, options, dry_run=dry_run)


def names_of(histories: Histories, name: str) -> int:
    return sum(found == name for _, found in histories.names())


def test_by_default_no_guess_ever_goes(sqlite: Histories) -> None:
    sqlite.make_run()
    sqlite.age(days=1000)
    before = sqlite.names()

    collected = sweep(sqlite)

    assert collected == Collected([], 0, held_by_backup=False)
    assert sqlite.names() == before


def test_old_shards_and_lists_go_and_selection_report_and_lineage_stay(histories: Histories) -> None:
    run_id = histories.make_run()
    histories.age(days=3)
    young = histories.make_run()

    collected = sweep(histories, **EAGER)

    assert {one.what: one.num for one in collected.expired} == {"shards of guesses": NUM_SHARDS, "lists of guesses": 1}
    assert collected.num_removed == NUM_SHARDS + 1
    with histories.database.reading() as session:
        rows = {row.run_id: row for row in session.scalars(sa.select(PseudoLabelSet))}
    assert rows[run_id].shards_expired_at is not None
    assert rows[run_id].items_expired_at is not None
    assert rows[run_id].report is not None
    assert rows[young].shards_expired_at is None
    assert names_of(histories, "shard.parquet") == NUM_SHARDS
    assert names_of(histories, "selected.parquet") == 2
    assert find_defects(histories.database, histories.storage, orphan_seconds=0) == []
    assert sweep(histories, **EAGER) == Collected([], 0, held_by_backup=False)


@pytest.mark.parametrize("done", range(5))
def test_shards_stay_while_their_iteration_goes_on(sqlite: Histories, done: int) -> None:
    """After the teacher, one, two, three shards, the selection: the student's training still waits."""
    sqlite.start_run()
    sqlite.work(most=1 + done)
    sqlite.age(days=3)

    sweep(sqlite, **EAGER)

    assert names_of(sqlite, "shard.parquet") == min(done, NUM_SHARDS)


def test_shards_of_a_failed_set_stay_for_its_retry_and_go_when_its_run_is_canceled(sqlite: Histories) -> None:
    run_id = sqlite.start_run()
    sqlite.work(most=3)
    job = sqlite.claim()
    assert job is not None
    sqlite.fail(job)
    sqlite.work(most=0)
    sqlite.age(days=3)
    sweep(sqlite, **EAGER)
    kept = names_of(sqlite, "shard.parquet")

    with sqlite.database.transaction() as session:
        move_run(session, run_id, "canceled")
    sweep(sqlite, **EAGER)

    assert (kept, names_of(sqlite, "shard.parquet")) == (2, 0)


def test_a_file_stays_as_long_as_one_owner_names_it(histories: Histories) -> None:
    histories.make_run()
    [shard, *_] = histories.ids(Job, Job.kind == "label")
    with histories.database.transaction() as session:
        file = session.get_one(StoredFile, (shard, "shard.parquet"))
        name_files(session, "job_other", {"shard.parquet": {"digest": file.digest, "num_bytes": file.num_bytes}})
    histories.age(days=3)

    dry = sweep(histories, dry_run=True, **EAGER)
    collected = sweep(histories, **EAGER)

    freed = {one.what: one.freed_bytes for one in collected.expired}
    assert collected.num_removed == NUM_SHARDS - 1 + 1
    assert file.digest in histories.stored()
    assert freed["shards of guesses"] == 2 * file.num_bytes
    assert dry.expired == collected.expired


def test_a_dry_run_changes_nothing(histories: Histories) -> None:
    histories.make_run()
    histories.store("named by nobody")
    histories.age(days=3)
    before = histories.names(), histories.stored()

    collected = sweep(histories, dry_run=True, **EAGER)

    assert {one.what for one in collected.expired} == {"shards of guesses", "lists of guesses"}
    assert collected.num_removed == 1
    assert (histories.names(), histories.stored()) == before


def test_a_backup_in_progress_keeps_every_file(histories: Histories) -> None:
    histories.make_run()
    histories.store("named by nobody")
    histories.age(days=3)
    before = histories.stored()
    with histories.database.transaction() as session:
        hold_singleton(session, BACKUP, holder="backup", seconds=600)

    collected = sweep(histories, **EAGER)

    assert collected.held_by_backup
    assert histories.stored() == before


def test_what_was_stored_lately_stays_although_no_row_names_it_yet(histories: Histories) -> None:
    """As an attempt leaves it a moment before its job succeeds: the same content as a run that is deleted just then."""
    run_id = histories.make_run()
    with histories.database.reading() as session:
        digest = session.scalars(sa.select(Generation.digest).where(Generation.run_id == run_id)).first()
    assert digest is not None
    content = histories.storage.fetch(digest).read_text(encoding="utf-8")
    histories.age(days=3)
    with histories.database.transaction() as session:
        delete_run(session, run_id)
    histories.store(content)

    collected = sweep(histories)

    assert digest in histories.stored()
    assert collected.num_removed > 0


def test_old_checkpoints_predictions_answers_and_workers_go(histories: Histories) -> None:
    generation_id = histories.make_import()
    prediction = histories.start_prediction(generation_id, "dsv_x")
    histories.work()
    histories.start_run()
    training = histories.claim()
    assert training is not None
    with histories.database.transaction() as session:
        name_files(session, training.id, {"checkpoint-1/last.ckpt": histories.store(), "attempt-1.log": histories.store()})
        remember_answer(session, key="k", api_key_id="a", fingerprint="f", status_code=202, body={}, location=None)
        for name in ("gone", "worker"):
            described = WorkerDescription(name=name, host="h", boot_id="b", pid=1, capabilities=("cpu",), slots=1, version="0")
            register_worker(session, described)
    held = {**EAGER, "keep_answers_days": 2, "keep_workers_days": 2}
    histories.age(days=3)
    running = sweep(histories, **held)
    with histories.database.reading() as session:
        # It still holds a job, however long it was silent.
        assert list(session.scalars(sa.select(Worker.name))) == ["worker"]

    histories.fail(training)
    histories.age(days=3)
    ended = sweep(histories, **held)

    assert {one.what for one in running.expired} == {"batch predictions", "answers to idempotency keys", "workers that are gone"}
    assert {one.what for one in ended.expired} == {"checkpoints of failed and canceled trainings", "workers that are gone"}
    assert (training.id, "attempt-1.log") in histories.names()
    assert (prediction, "predictions.parquet") not in histories.names()
    assert (histories.count(IdempotencyRecord), histories.count(Worker)) == (0, 0)


def test_what_stays_is_listed_with_what_keeps_it(histories: Histories) -> None:
    run_id = histories.make_run()
    imported = [histories.make_import() for _ in range(3)]
    histories.promote(imported[0])
    histories.promote(imported[1])

    with histories.database.reading() as session:
        kept = {(kind, keeper): use.num_files for kind, keeper, use in measure_kept(session)}

    assert kept["generations", "an alias"] == 2
    assert kept["generations", "the history of an alias"] == 2
    assert kept["generations", "nothing: they may be deleted"] == 2
    assert kept["generations", "a generation or set that they made"] + kept["generations", "their runs"] == 6
    assert kept["shards", "their pseudo-label sets, or keep_shards_days"] == NUM_SHARDS
    assert sum(kept.values()) == len(histories.names())
    assert run_id


def test_every_rule_is_a_setting() -> None:
    assert {rule.setting for rule in RULES} == {name for name in Settings.model_fields if name.startswith("keep_")}


moves = st.lists(
    st.sampled_from(
        ["run", "import", "set", "predict", "work one", "work", "promote", "cancel", "fail", "age", "give up", "backup", "twin"]
    ),
    min_size=4,
    max_size=14,
)


def play(histories: Histories, name: str) -> None:
    """One thing that can happen, if it can happen now."""
    generations, runs = histories.ids(Generation), histories.ids(Run)
    if name == "run":
        histories.start_run(initial=generations[-1] if generations else None)
    elif name == "import":
        histories.make_import()
    elif name in ("set", "predict") and generations:
        version = histories.add_version(f"pool-{len(histories.names())}", "unlabeled")
        (histories.start_set if name == "set" else histories.start_prediction)(generations[0], version.id)
    elif name.startswith("work"):
        histories.work(most=1 if name == "work one" else 100)
    elif name == "promote" and generations:
        histories.promote(generations[len(generations) // 2])
    elif name == "cancel" and runs:
        with histories.database.transaction() as session:
            for job in session.scalars(sa.select(Job).where(Job.status == "queued", Job.run_id.is_not(None))).all():
                jobs.request_cancel(session, job.id)
    elif name == "fail" and (job := histories.claim()) is not None:
        histories.fail(job)
    elif name == "age":
        histories.age(days=3)
    elif name == "give up" and runs:
        with histories.database.transaction() as session:
            session.execute(sa.update(Run).where(Run.id == runs[0], Run.status == "failed").values(status="canceled"))
    elif name == "backup":
        with histories.database.transaction() as session:
            hold_singleton(session, BACKUP, holder="backup", seconds=600)
    elif name == "twin" and histories.names():
        with histories.database.transaction() as session:
            file = session.scalars(sa.select(StoredFile).order_by(StoredFile.owner_id, StoredFile.name)).first()
            assert file is not None
            name_files(session, "job_twin", {f"{file.name}-{file.owner_id}": {"digest": file.digest, "num_bytes": 1}})


def needed(histories: Histories) -> set[str]:
    """Digests that must stay, told without the rules: all but guesses of what is over, checkpoints and predictions."""
    with histories.database.reading() as session:
        files = list(session.scalars(sa.select(StoredFile)))
        waiting = {row.id for row in session.scalars(sa.select(PseudoLabelSet)) if row.status in ("labeling", "selecting", "failed")}
        canceled = set(
            session.scalars(sa.select(PseudoLabelSet.id).join(Run, Run.id == PseudoLabelSet.run_id).where(Run.status == "canceled"))
        )
        set_of_job = {job.id: job.pseudo_label_set_id for job in session.scalars(sa.select(Job).where(Job.kind == "label"))}
        aliased = set(session.scalars(sa.select(Alias.generation_id))) | set(session.scalars(sa.select(Promotion.generation_id)))
    passing = ("shard.parquet", "items.parquet", "predictions.parquet")
    stays = {
        file.digest
        for file in files
        if file.name not in passing or file.owner_id in aliased or set_of_job.get(file.owner_id) in waiting - canceled
    }
    return stays | {file.digest for file in files if file.owner_id == "job_twin"}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=moves)
def test_whatever_happened_nothing_that_is_needed_ever_goes(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("histories")
    (directory / "rows.sqlite3").write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{directory / 'rows.sqlite3'}")
    histories = Histories(database, directory)
    try:
        for number, name in enumerate(names, start=1):
            play(histories, name)
            before, kept, generations = needed(histories), histories.stored(), histories.ids(Generation)
            held = "backup" in names[:number]
            sweep(histories, **EAGER)

            assert before <= histories.stored()
            assert histories.ids(Generation) == generations
            assert not held or histories.stored() == kept
            with database.reading() as session:
                assert set(session.scalars(sa.select(StoredFile.digest))) <= histories.stored()
    finally:
        database.close()


def test_a_bite_of_sets_without_files_is_not_the_end(sqlite: Histories) -> None:
    for _ in range(3):
        sqlite.make_run()
    sqlite.age(days=3)
    with sqlite.database.transaction() as session:
        first = sa.select(PseudoLabelSet.id).limit(2)
        jobs_of_first = sa.select(Job.id).where(Job.pseudo_label_set_id.in_(list(session.scalars(first))))
        session.execute(sa.delete(StoredFile).where(StoredFile.owner_id.in_(list(session.scalars(jobs_of_first)))))

    assert sum(take_in_bites(sqlite, most_sets=1)) == NUM_SHARDS


def take_in_bites(histories: Histories, *, most_sets: int) -> list[int]:
    """How many files each bite took, to the end."""
    options, bites, is_more = Settings(data_directory=histories.directory / "data", keep_shards_days=2), [], True
    while is_more:
        with histories.database.transaction() as session:
            bite, is_more = expire(session, options, most_sets=most_sets)
        bites.append(sum(one.num for one in bite))
    return bites


def test_many_sets_go_a_few_at_a_time(sqlite: Histories) -> None:
    for _ in range(3):
        sqlite.make_run()
    sqlite.age(days=3)

    assert take_in_bites(sqlite, most_sets=2) == [2 * NUM_SHARDS, NUM_SHARDS, 0]
