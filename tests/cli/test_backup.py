"""A backup holds one moment of a service that goes on working; a restore gives that moment back elsewhere, or nothing."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from core.db.tables import Base, Job
from core.db.workers import hold_singleton, is_held
from core.settings import Settings
from core.storage import LocalStorage
from tests.builders_services import create_database
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


def copying_slowly(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Each file takes more than twice as long to copy as the hold on the sweep lasts."""
    put = LocalStorage.put

    def put_slowly(storage: LocalStorage, path: Path) -> dict[str, Any]:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            meanwhile()
            time.sleep(0.05)
        return put(storage, path)

    monkeypatch.setattr("cli.backup.HOLD_SECONDS", 0.6)
    monkeypatch.setattr(LocalStorage, "put", put_slowly)


def test_the_sweep_is_held_however_long_one_file_takes(
    command: Terminal, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, held = opened(sqlite_url), set[bool]()
    lead_a_life(database, LocalStorage(tmp_path / "here" / "objects"), tmp_path)

    def look() -> None:
        with database.reading() as session:
            held.add(is_held(session, BACKUP))

    copying_slowly(monkeypatch, look)
    made = command("backup", "kept", **places(sqlite_url, tmp_path / "here"))

    assert made.returncode == 0, made.stderr
    assert held == {True}
    look()
    assert held == {True, False}
    database.close()


def test_a_backup_whose_hold_on_the_sweep_lapsed_says_so_and_is_none(
    command: Terminal, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, asked = opened(sqlite_url), itertools.count()
    lead_a_life(database, LocalStorage(tmp_path / "here" / "objects"), tmp_path)

    def hold_once(session: Session, name: str, *, holder: str, seconds: float) -> bool:
        if next(asked):
            raise sa.exc.OperationalError("", {}, Exception("away"))
        return hold_singleton(session, name, holder=holder, seconds=seconds)

    monkeypatch.setattr("cli.backup.hold_singleton", hold_once)
    copying_slowly(monkeypatch, lambda: None)
    made = command("backup", "kept", **places(sqlite_url, tmp_path / "here"))

    assert made.returncode != 0
    assert "files may have been swept meanwhile; begin the backup again" in made.stderr
    assert not (tmp_path / "kept" / "backup.json").exists()
    database.close()


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
