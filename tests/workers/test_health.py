"""`python -m workers.health`: what a container's health check learns, without database and broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from core.db.schema import migrate
from core.db.session import Database
from core.db.workers import WorkerDescription, register_worker
from core.queue import PollingOnly
from core.settings import Settings
from core.storage import LocalStorage
from tests.architecture.sources import REPOSITORY
from tests.builders_services import create_database, running_postgresql, wait_until
from tests.workers.builders import make_settings, running_worker, worker_inside
from workers import health
from workers.health import SILENT_SECONDS, SignOfLife, find_problem
from workers.housekeeping import Housekeeping


def check(data_directory: Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOISY_STUDENT_")}
    environment = inherited | {"NOISY_STUDENT_DATA_DIRECTORY": str(data_directory)}
    return subprocess.run(
        [sys.executable, "-m", "workers.health"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def grow_old(path: Path, seconds: float) -> None:
    moment = path.stat().st_mtime - seconds
    os.utime(path, (moment, moment))


def test_a_worker_that_lives_is_healthy_a_frozen_one_and_a_dead_one_are_not(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    with running_worker(make_settings(tmp_path, database), tmp_path) as worker:
        started = wait_until(lambda: worker.lines("worker.started"), what="the worker's start")
        alive = check(tmp_path / "data")

        worker.signal(signal.SIGSTOP)
        grow_old(tmp_path / "data" / "workers" / f"{started[0]['worker_id']}.json", SILENT_SECONDS + 1)
        frozen = check(tmp_path / "data")

        worker.kill()
        dead = check(tmp_path / "data")

    assert (alive.returncode, alive.stderr) == (0, "")
    assert (frozen.returncode, frozen.stderr.count("\n")) == (1, 1)
    assert f"worker {started[0]['worker_id']} has been silent for 6" in frozen.stderr
    assert (dead.returncode, dead.stderr.count("\n")) == (1, 1)
    assert "no worker of this machine is alive" in dead.stderr
    database.close()


def test_a_worker_goes_on_showing_signs_while_its_database_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.supervisor.SEEN_SECONDS", 0.1)
    with ExitStack() as server, ExitStack() as worker:
        url = create_database(server.enter_context(running_postgresql()), "of_the_worker")
        database = Database(Settings(database_url=url).resolved_database_url)
        migrate(database)
        worker.enter_context(worker_inside(make_settings(tmp_path, database)))
        [sign] = (tmp_path / "data" / "workers").glob("*.json")
        server.close()
        grow_old(sign, SILENT_SECONDS + 1)

        wait_until(lambda: find_problem(sign.parent) is None, what="a sign of life")
    database.close()


def test_workers_of_other_machines_and_containers_on_the_same_files_do_not_count(tmp_path: Path) -> None:
    SignOfLife(tmp_path, "wkr_mine").begin()
    other = json.loads((tmp_path / "wkr_mine.json").read_text()) | {"boot_id": "another pid:[4026531836]"}
    (tmp_path / "wkr_other.json").write_text(json.dumps(other))
    grow_old(tmp_path / "wkr_other.json", 10**6)

    assert find_problem(tmp_path) is None
    SignOfLife(tmp_path, "wkr_mine").end()
    assert find_problem(tmp_path) is not None


def test_a_clock_that_is_wrong_makes_nobody_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)

    SignOfLife(tmp_path, "wkr_mine").begin()

    assert find_problem(tmp_path) is None
    assert abs((tmp_path / "wkr_mine.json").stat().st_mtime - health._uptime()) < 60


def test_signs_of_workers_that_ended_without_a_word_are_swept_after_a_day(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    settings = make_settings(tmp_path, database)
    description = WorkerDescription(name="w:1:1", host="h", boot_id="b", pid=1, capabilities=("cpu",), slots=1, version="0")
    with database.transaction() as session:
        kept = register_worker(session, description).id
    for name in (kept, "wkr_unknown"):
        SignOfLife(settings.workers_directory, name).begin()

    Housekeeping(settings, database, LocalStorage(settings.objects_directory), PollingOnly(), holder="a").sweep()

    assert [path.stem for path in settings.workers_directory.iterdir()] == [kept]
    database.close()
