"""Bad set-ups through the real command: one clear line on stderr, and the exit code that says whose fault it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.settings import Settings
from tests.cli.builders import command


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def test_up_on_a_taken_port_says_so_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        done = command("up", "--port", str(port), directory=tmp_path)

    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port with --port"
    ]


@pytest.mark.parametrize("place", ["file/data", "/sys/kernel/data"], ids=["a file in the way", "where not even root may write"])
def test_up_over_a_data_directory_that_is_not_writable_ends_with_2(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")

    done = command("up", "--data-directory", place, directory=tmp_path)

    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: the data directory {place} is not writable")


def test_a_setting_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "database-url"
    secret.write_text("postgresql://user:secret@db/rows\n", encoding="utf-8")
    monkeypatch.setenv("NOISY_STUDENT_DATABASE_URL_FILE", str(secret))
    monkeypatch.setenv("NOISY_STUDENT_REDIS_URL", "")

    settings = Settings()

    assert settings.database_url == "postgresql://user:secret@db/rows"
    assert settings.redis_url is None
    monkeypatch.setenv("NOISY_STUDENT_DATABASE_URL", "sqlite:///rows")
    assert Settings().database_url == "sqlite:///rows"


@pytest.mark.parametrize("module", ["server", "workers"])
def test_a_secret_file_that_is_not_there_is_one_line_and_status_2(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "NOISY_STUDENT_DATABASE_URL_FILE": str(tmp_path / "nowhere")}

    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: NOISY_STUDENT_DATABASE_URL_FILE names {tmp_path / 'nowhere'}, which cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NOISY_STUDENT_LEASE_SECONDS": "-1"}, "NOISY_STUDENT_LEASE_SECONDS"),
        ({"NOISY_STUDENT_SLOTS": "many"}, "NOISY_STUDENT_SLOTS"),
        ({"NOISY_STUDENT_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/none"}, "cannot be opened"),
        ({"NOISY_STUDENT_DATABASE_URL": "cuneiform://tablet"}, "must begin with postgresql"),
    ],
    ids=["a negative lease", "slots that are no number", "a database that is away", "a database that nobody knows"],
)
def test_up_with_a_setting_that_cannot_work_ends_with_2(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    done = command("up", "--port", free_port(), directory=tmp_path, **environment)

    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert words in line
    assert "secret" not in line


def test_a_verb_that_does_not_exist_ends_with_2(tmp_path: Path) -> None:
    done = command("fly", directory=tmp_path)

    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr


def test_a_service_that_is_not_there_ends_with_3_and_says_how_to_start_one(tmp_path: Path) -> None:
    done = command("runs", "list", "--url", f"127.0.0.1:{free_port()}", directory=tmp_path)

    assert done.returncode == 3
    [line] = done.stderr.splitlines()
    assert "noisy-student up" in line


def test_a_program_gets_its_problem_as_json(tmp_path: Path) -> None:
    done = command("runs", "list", "--json", "--url", f"127.0.0.1:{free_port()}", directory=tmp_path)

    assert done.returncode == 3
    assert "nothing answers" in json.loads(done.stderr)["error"]["message"]


def test_doctor_verify_without_a_database_ends_with_2(tmp_path: Path) -> None:
    done = command("doctor", "--verify", directory=tmp_path)

    assert done.returncode == 2
    assert "there is no database" in done.stderr


def test_migrate_makes_the_database_and_may_be_repeated(tmp_path: Path) -> None:
    first, second = (command("migrate", "--data-directory", "data", "--json", directory=tmp_path) for _ in range(2))

    assert (first.returncode, second.returncode) == (0, 0)
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert (tmp_path / "data/noisy-student.sqlite3").exists()
