"""`up` as people use it: it starts, is found by the other verbs, survives its children, and goes without leaving anything behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli import doctor
from core.settings import Settings
from tests.builders_services import wait_until
from tests.cli.builders import command
from tests.cli.test_setup import free_port


class Up:
    """A running `up` in a folder of the test's own."""

    def __init__(self, directory: Path, *program: str) -> None:
        """By `python -m cli.main`, or by another program for the interpreter."""
        self.directory = directory
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("NOISY_STUDENT_")}
        environment = inherited | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.log = directory / "up.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(program or ("-m", "cli.main")), "up", "--port", free_port()],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait((directory / "noisy-student-data/service.json").exists, "the service")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        return wait_until(condition, seconds=60, what=what)

    def children(self) -> dict[str, int]:
        """Process id of each child by its module."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            words = _command_of(int(pid)).split("\0")
            # One that just died has no command any more.
            if words[1:2] == ["-m"]:
                found[words[2]] = int(pid)
        return found


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def lives(pid: int) -> bool:
    """Whether the process is there and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


def test_other_verbs_find_address_and_key_by_themselves_and_ctrl_c_ends_with_0(up: Up, tmp_path: Path) -> None:
    listed = command("keys", "list", "--json", directory=tmp_path)
    key_file = tmp_path / "noisy-student-data/admin.key"
    children = up.children()

    up.process.send_signal(signal.SIGINT)
    code = up.process.wait(60)

    assert [key["name"] for key in json.loads(listed.stdout)] == ["first admin key"]
    assert key_file.stat().st_mode & 0o077 == 0
    assert key_file.read_text(encoding="utf-8").strip() in up.log.read_text(encoding="utf-8")
    assert code == 0
    assert not any(lives(pid) for pid in children.values())
    assert not (tmp_path / "noisy-student-data/service.json").exists()


def test_kill_9_takes_the_children_down_and_the_next_up_shows_no_second_key(up: Up, tmp_path: Path) -> None:
    children = up.children()

    up.process.kill()
    up.process.wait()
    up.wait(lambda: not any(lives(pid) for pid in children.values()), "the end of the children")
    (tmp_path / "noisy-student-data/service.json").unlink()
    again = Up(tmp_path)
    listed = command("keys", "list", "--json", directory=tmp_path)
    again.process.terminate()

    assert set(children) == {"server", "workers"}
    assert len(json.loads(listed.stdout)) == 1
    assert again.process.wait(60) == 0


def test_a_second_up_over_one_data_directory_names_the_first_and_ends_with_2(up: Up, tmp_path: Path) -> None:
    done = command("up", "--port", free_port(), directory=tmp_path)

    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"(process {up.process.pid}) holds the data directory noisy-student-data" in line
    assert up.process.poll() is None


def test_killed_children_are_started_again(up: Up) -> None:
    before = up.children()

    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    up.wait(lambda: up.children().keys() == before.keys() and not set(up.children().values()) & set(before.values()), "new children")
    assert "ended with -9; starting it again" in up.log.read_text(encoding="utf-8")


IMPATIENT = """
from cli import processes
processes.PROBE_SECONDS, processes.PROBE_PATIENCE_SECONDS, processes.MISSES_OF_A_HUNG_CHILD = 1.6, 1.5, 3
from cli.main import main
main()
"""


def test_doctor_notices_a_service_that_runs_but_does_not_answer(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, api = Settings(data_directory=up.directory / "noisy-student-data"), up.children()["server"]
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 1.0)
    well = doctor.look_at_service(settings)

    os.kill(api, signal.SIGSTOP)
    try:
        ill = doctor.look_at_service(settings)
    finally:
        os.kill(api, signal.SIGCONT)

    assert (well.verdict, ill.verdict) == ("ok", "bad")
    assert "does not answer within 1 s" in ill.message


def test_an_api_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    up = Up(tmp_path, "-c", IMPATIENT)
    try:
        api, worker = up.children()["server"], up.children()["workers"]
        up.wait(lambda: "alive" in ask_liveness(up), "an answer")

        os.kill(api, signal.SIGSTOP)
        up.wait(lambda: up.children().get("server") not in (api, None), "another API")

        up.wait(lambda: "alive" in ask_liveness(up), "its answer")
        assert not lives(api)
        assert up.children()["workers"] == worker
        assert "the api process does not answer any more; ending it" in up.log.read_text(encoding="utf-8")
    finally:
        up.process.terminate()
        assert up.process.wait(60) == 0


def ask_liveness(up: Up) -> str:
    url = json.loads((up.directory / "noisy-student-data/service.json").read_text(encoding="utf-8"))["url"]
    try:
        return httpx.get(f"{url}/livez", trust_env=False, timeout=5).text
    except httpx.TransportError:
        return ""
