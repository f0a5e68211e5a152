"""Sums over the rows that name stored files: a content counts once, and what is shared would not be freed."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from core.db import disk_use
from core.db.deletion import delete_run
from core.db.disk_use import KINDS, Use
from core.db.files import name_files
from core.db.session import Database
from core.db.tables import Generation, PseudoLabelSet
from core.settings import Settings
from tests.builders_histories import Histories
from workers.garbage import collect


@pytest.fixture
def histories(database: Database, tmp_path: Path) -> Histories:
    return Histories(database, tmp_path)


def bytes_in_storage(histories: Histories) -> int:
    return sum(path.stat().st_size for path in histories.storage.directory.glob("??/*"))


def test_what_deleting_a_run_would_free_is_what_the_sweep_then_removes(histories: Histories, tmp_path: Path) -> None:
    first = histories.make_run()
    second = histories.make_run()
    shared = {"same.bin": histories.store("needed by both")}
    with histories.database.transaction() as session:
        for run_id in (first, second):
            name_files(session, session.scalars(sa.select(Generation.id).where(Generation.run_id == run_id)).first() or "", shared)
    histories.age(days=1)
    before = bytes_in_storage(histories)
    with histories.database.transaction() as session:
        use = disk_use.measure(session, disk_use.owners_of_run(first))
        delete_run(session, first)

    collect(histories.database, histories.storage, Settings(data_directory=tmp_path / "data"))

    assert use.shared_bytes == len("needed by both")
    assert before - bytes_in_storage(histories) == use.freed_bytes > 0


def test_all_parts_of_a_run_are_measured_and_each_content_once(histories: Histories) -> None:
    run_id = histories.make_run(iterations=2)
    with histories.database.transaction() as session:
        [student, *_] = session.scalars(sa.select(Generation.id).where(Generation.run_id == run_id))
        name_files(session, student, {"copy.onnx": histories.store("twice"), "again.onnx": histories.store("twice")})

    with histories.database.reading() as session:
        owners = disk_use.owners_of_run(run_id)
        whole, kinds = disk_use.measure(session, owners), disk_use.measure_kinds(session, owners)
        generations, sets = disk_use.measure_generations(session, run_id), disk_use.measure_sets(session, run_id)

    assert list(kinds) == [kind for kind in KINDS if kind in kinds]
    assert {kind: use.num_files for kind, use in kinds.items()} == {"shards": 6, "items": 2, "selections": 2, "generations": 11, "logs": 13}
    assert whole.num_files == sum(use.num_files for use in kinds.values())
    assert whole.num_bytes == sum(use.num_bytes for use in kinds.values())
    assert generations[student].num_files == 3
    assert set(generations) == set(histories.ids(Generation))
    # Three shards, a selection, a list of guesses, and the logs of four jobs.
    assert {set_id: use.num_files for set_id, use in sets.items()} == dict.fromkeys(histories.ids(PseudoLabelSet), 9)


def test_all_together_is_what_lies_in_storage(histories: Histories) -> None:
    generation_id = histories.make_import()
    runs = [histories.make_run(iterations=iterations, initial=generation_id) for iterations in (1, 2)]

    with histories.database.reading() as session:
        whole, listed = disk_use.measure_all(session), disk_use.measure_runs(session, limit=10)
        [largest] = disk_use.measure_runs(session, limit=1)

    assert whole == Use(len(histories.stored()), bytes_in_storage(histories))
    assert [run.id for run, _ in listed] == runs[::-1]
    assert largest[0].id == runs[1]


def test_what_has_no_files_uses_nothing(histories: Histories) -> None:
    run_id = histories.start_run()

    with histories.database.reading() as session:
        assert disk_use.measure(session, disk_use.owners_of_run(run_id)) == Use(0, 0, 0)
        assert disk_use.measure_runs(session, limit=10) == []


def test_the_number_of_queries_does_not_grow_with_the_shards(sqlite_url: str, tmp_path: Path) -> None:
    histories = Histories(Database(sqlite_url), tmp_path)
    statements: list[str] = []
    with histories.database.reading() as session:
        sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *call: statements.append(call[2]))
    counts = []
    for iterations in (1, 3):
        run_id = histories.make_run(iterations=iterations)
        statements.clear()
        with histories.database.reading() as session:
            owners = disk_use.owners_of_run(run_id)
            disk_use.measure_runs(session, limit=100)
            disk_use.measure_kinds(session, owners)
            disk_use.measure(session, owners)
            disk_use.measure_sets(session, run_id)
            disk_use.measure_generations(session, run_id)
        counts.append(len(statements))
    histories.database.close()

    # The database's own question at the beginning of a transaction is one of them.
    assert counts[0] == counts[1] <= 6
