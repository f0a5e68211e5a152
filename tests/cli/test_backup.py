"""A backup holds one moment of a service that goes on working; a restore gives that moment back elsewhere, or nothing."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from cli.main import run
from cli.verify import find_defects
from core.db.files import name_files
from core.db.jobs import NewJob, enqueue
from core.db.session import Database
from core.db.tables import Base, Job, SingletonLease
from core.db.workers import is_held
from core.settings import Settings
from core.storage import LocalStorage
from tests.builders_services import create_database, wait_until
from tests.cli.builders import History, lead_a_life
from workers.garbage import BACKUP


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stderr: str


class Terminal:
    """`noisy-student` in this process, because a backup and a restore are many starts of one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, **environment: str) -> Ended:
        for name, value in environment.items():
            self._monkeypatch.setenv(name, value)
        code = run(list(arguments))
        return Ended(code, self._capsys.readouterr().err)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, monkeypatch, capsys)


def opened(url: str) -> Database:
    return Database(Settings(database_url=url).resolved_database_url)


def read_all(database: Database) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, in a fixed order."""
    with database.reading() as session:
        return {
            table.name: sorted((dict(row) for row in session.execute(sa.select(table)).mappings()), key=repr)
            for table in Base.metadata.sorted_tables
            if table.name != "singleton_leases"
        }


@pytest.fixture
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, of the kind that the test names."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}"
    return create_database(request.getfixturevalue("postgresql"), f"empty_{uuid4().hex}")


@pytest.mark.parametrize("empty_url", ["sqlite", "postgresql"], indirect=True)
def test_a_restored_service_has_the_same_rows_and_files_on_either_database(
    command: Terminal, database_url: str, empty_url: str, tmp_path: Path
) -> None:
    database, here, there = opened(database_url), tmp_path / "here", tmp_path / "there"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    (here / "admin.key").write_text("the key\n", encoding="utf-8")

    made = command("backup", "kept", **places(database_url, here))
    brought = command("restore", "kept", **places(empty_url, there))

    assert (made.returncode, brought.returncode) == (0, 0), made.stderr + brought.stderr
    restored = opened(empty_url)
    assert read_all(restored) == read_all(database)
    assert find_defects(restored, LocalStorage(there / "objects"), orphan_seconds=0) == []
    assert (there / "admin.key").read_text(encoding="utf-8") == "the key\n"
    with restored.transaction() as session:
        enqueue(session, [NewJob(kind="ingest", input={})])
    database.close()
    restored.close()


def places(url: str, directory: Path) -> dict[str, str]:
    return {"NOISY_STUDENT_DATABASE_URL": url, "NOISY_STUDENT_DATA_DIRECTORY": str(directory)}


def test_rows_that_come_meanwhile_are_there_whole_or_not_at_all(command: Terminal, database_url: str, tmp_path: Path) -> None:
    database, here, there = opened(database_url), tmp_path / "here", tmp_path / "there"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    ended = threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            with database.transaction() as session:
                enqueue(session, [NewJob(kind="ingest", input={}) for _ in range(20)])

    busy = threading.Thread(target=go_on)
    busy.start()
    try:
        made = command("backup", "kept", **places(database_url, here))
    finally:
        ended.set()
        busy.join()
    brought = command("restore", "kept", **places(f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}", there))

    assert (made.returncode, brought.returncode) == (0, 0), made.stderr + brought.stderr
    restored = opened(f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}")
    rows = read_all(restored)
    waiting = {row["id"] for row in rows["jobs"] if row["status"] == "queued"}
    assert len(waiting) % 20 == 0
    assert waiting == {row["job_id"] for row in rows["outbox"]} & waiting
    assert find_defects(restored, LocalStorage(there / "objects"), orphan_seconds=0) == []
    database.close()
    restored.close()


def test_checkpoints_which_come_and_go_are_left_out(command: Terminal, sqlite_url: str, tmp_path: Path) -> None:
    database, here, there = opened(sqlite_url), tmp_path / "here", tmp_path / "there"
    history = lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    with database.transaction() as session:
        # Its file is gone already: the attempt has written the next one meanwhile.
        gone = {"digest": "0" * 64, "num_bytes": 1}
        name_files(session, read_teacher_job(session, history), {"checkpoint-1/last.ckpt": gone})

    made = command("backup", "kept", **places(sqlite_url, here))
    brought = command("restore", "kept", **places(f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}", there))

    assert (made.returncode, brought.returncode) == (0, 0), made.stderr + brought.stderr
    restored = opened(f"sqlite:///{tmp_path / 'elsewhere.sqlite3'}")
    names = {row["name"] for row in read_all(restored)["stored_files"]}
    assert "model.safetensors" in names
    assert "checkpoint-1/last.ckpt" not in names
    database.close()
    restored.close()


def read_teacher_job(session: Session, history: History) -> str:
    return session.scalars(sa.select(Job.id).where(Job.run_id == history.run_id)).one()


def while_files_are_copied(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> list[Path]:
    """Something happens before each file is stored in the backup; returns the list of those that were."""
    put, copied = LocalStorage.put, []

    def put_slowly(storage: LocalStorage, path: Path) -> dict[str, Any]:
        happens()
        copied.append(path)
        return put(storage, path)

    monkeypatch.setattr(LocalStorage, "put", put_slowly)
    return copied


def change_hold(database: Database, **values: Any) -> None:
    with database.transaction() as session:
        session.execute(sa.update(SingletonLease).where(SingletonLease.name == BACKUP).values(**values))


def test_the_sweep_is_held_for_as_long_as_one_file_takes_to_copy(
    command: Terminal, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, here = opened(database_url), tmp_path / "here"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    monkeypatch.setattr("cli.backup.RENEW_SECONDS", 0.01)

    def read_until() -> datetime:
        with database.reading() as session:
            return session.scalars(sa.select(SingletonLease.until).where(SingletonLease.name == BACKUP)).one()

    def wait_for_renewal() -> None:
        before = read_until()
        wait_until(lambda: read_until() > before, what="a renewal of the hold")

    copied = while_files_are_copied(monkeypatch, wait_for_renewal)
    made = command("backup", "kept", **places(database_url, here))

    assert made.returncode == 0, made.stderr
    assert copied
    with database.reading() as session:
        assert not is_held(session, BACKUP)
    database.close()


def test_a_backup_whose_hold_ran_out_is_none_and_says_so(
    command: Terminal, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, here = opened(database_url), tmp_path / "here"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)

    while_files_are_copied(monkeypatch, lambda: change_hold(database, until=datetime(2020, 1, 1, tzinfo=UTC)))
    made = command("backup", "kept", **places(database_url, here))

    assert made.returncode == 1
    assert "the backup's hold on the sweep was not renewed for 120 s" in made.stderr
    assert not (tmp_path / "kept/backup.json").exists()
    database.close()


def test_a_backup_that_lost_its_hold_copies_nothing_more(
    command: Terminal, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, here = opened(database_url), tmp_path / "here"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    monkeypatch.setattr("cli.backup.RENEW_SECONDS", 0.01)

    def lose_the_hold() -> None:
        change_hold(database, holder="another backup")
        wait_until(lambda: "hold-on-the-sweep" not in {thread.name for thread in threading.enumerate()}, what="the loss to be noticed")

    copied = while_files_are_copied(monkeypatch, lose_the_hold)
    made = command("backup", "kept", **places(database_url, here))

    assert (made.returncode, len(copied)) == (1, 1)
    database.close()


def test_a_second_backup_into_the_same_folder_keeps_the_files_and_replaces_the_rows(
    command: Terminal, sqlite_url: str, tmp_path: Path
) -> None:
    database, here = opened(sqlite_url), tmp_path / "here"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    command("backup", "kept", **places(sqlite_url, here))
    files = {path: path.stat().st_ino for path in (tmp_path / "kept/objects").glob("??/*")}
    with database.transaction() as session:
        enqueue(session, [NewJob(kind="ingest", input={})])
    database.close()

    again = command("backup", "kept", **places(sqlite_url, here))

    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_ino for path in (tmp_path / "kept/objects").glob("??/*")} == files
    [rows] = (tmp_path / "kept").glob("rows-*")
    with gzip.open(rows / "jobs.jsonl.gz", "rt") as file:
        assert [json.loads(line)["status"] for line in file].count("queued") == 1


def test_a_backup_into_a_file_is_refused_in_one_line(command: Terminal, sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine", encoding="utf-8")

    answer = command("backup", "kept", **places(sqlite_url, tmp_path / "here"))

    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "kept is a file; a backup is a folder" in answer.stderr
    assert (tmp_path / "kept").read_text(encoding="utf-8") == "mine"


def test_nothing_is_restored_over_what_is_there(command: Terminal, sqlite_url: str, tmp_path: Path) -> None:
    database, here = opened(sqlite_url), tmp_path / "here"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    before = read_all(database)
    command("backup", "kept", **places(sqlite_url, here))

    same_directory = command("restore", "kept", **places(f"sqlite:///{tmp_path / 'new.sqlite3'}", here))
    same_database = command("restore", "kept", **places(sqlite_url, tmp_path / "there"))
    no_backup = command("restore", "here", **places(sqlite_url, tmp_path / "there"))

    assert [one.returncode for one in (same_directory, same_database, no_backup)] == [2, 2, 2]
    assert "is not empty (objects)" in same_directory.stderr
    assert "the database has tables already" in same_database.stderr
    assert "is no complete backup" in no_backup.stderr
    assert read_all(database) == before
    database.close()


def test_an_altered_backup_is_refused_and_the_same_restore_can_be_finished_later(
    command: Terminal, sqlite_url: str, tmp_path: Path
) -> None:
    database, here, there = opened(sqlite_url), tmp_path / "here", tmp_path / "there"
    lead_a_life(database, LocalStorage(here / "objects"), tmp_path)
    command("backup", "kept", **places(sqlite_url, here))
    broken = max((tmp_path / "kept/objects").glob("??/*"))
    content = broken.read_bytes()
    broken.chmod(0o600)
    broken.write_bytes(content + b"!")
    environment = places(f"sqlite:///{tmp_path / 'new.sqlite3'}", there)

    refused = command("restore", "kept", **environment)
    started = command("up", **environment)
    broken.write_bytes(content)
    finished = command("restore", "kept", **environment)

    assert (refused.returncode, started.returncode, finished.returncode) == (1, 2, 0), finished.stderr
    assert f"the backup's file {broken.name} was altered" in refused.stderr
    assert "was not finished: run `noisy-student restore" in started.stderr
    restored = opened(environment["NOISY_STUDENT_DATABASE_URL"])
    assert read_all(restored) == read_all(database)
    database.close()
    restored.close()
