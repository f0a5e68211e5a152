"""`make fleet`: the Compose file's commands as processes, losing one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.processes import BIN, Processes, Service, embedded, free_port, wait_until
from tests.e2e.test_whole_loop import write_folders

pytestmark = pytest.mark.timeout(1500)

MEMBERS = {"postgres", "redis", "storage", "proxy", "api-1", "api-2", "predictor-1", "predictor-2", "worker-1", "worker-2", "worker-3"}
# An undisturbed demo has 253 events: the kills fall into every kind of step.
EVENTS_BETWEEN_KILLS = 15


class PatientService(Service):
    """A client that asks again while something behind the address is being started anew; what starts work is sent with a key."""

    def get(self, path: str, **params: Any) -> Any:
        def answer() -> httpx.Response | None:
            with contextlib.suppress(httpx.TransportError):
                response = self.client.get(path, params=params)
                return response if response.status_code < 500 else None
            return None

        response: httpx.Response = wait_until(answer, seconds=90, what=f"an answer of {path}")
        assert response.status_code == 200, response.text
        return response.json()


@dataclass
class RunningFleet:
    """The runner's process, and what it wrote about its members."""

    directory: Path
    runner: subprocess.Popen[bytes]
    service: PatientService

    def pids(self) -> dict[str, int]:
        state = json.loads((self.directory / "fleet.json").read_text(encoding="utf-8"))
        return {name: facts["pid"] for name, facts in state["processes"].items()}

    def kill(self, name: str) -> int:
        pid = self.pids()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_for_events(self, run_id: str, *, beyond: int) -> None:
        path = f"/api/v1/runs/{run_id}/events"
        wait_until(lambda: self.service.get(path, after=beyond, limit=1)["items"], seconds=300, what=f"an event beyond {beyond}")

    def wait_for_another(self, name: str, pid: int) -> None:
        wait_until(lambda: self.pids().get(name, pid) != pid, seconds=60, what=f"another process of {name}")


@contextlib.contextmanager
def running_fleet(directory: Path, *words: str) -> Iterator[RunningFleet]:
    port = free_port()
    log = directory / "fleet.log"
    command = [sys.executable, "-m", "deploy", "--directory", str(directory / "fleet"), "--port", str(port), *words]
    with log.open("wb") as file:
        runner = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    service = PatientService(Processes(directory, {}), port=port, data_directory=directory / "fleet")
    try:
        wait_until(lambda: _shown_key(log) or runner.poll() is not None, seconds=240, what="the fleet's start")
        shown = _shown_key(log)
        assert shown, log.read_text()
        service.use_key(shown)
        yield RunningFleet(directory / "fleet", runner, service)
    finally:
        service.client.close()
        runner.send_signal(signal.SIGINT)
        runner.wait(120)


def _shown_key(log: Path) -> str:
    words = log.read_text(encoding="utf-8", errors="replace").split()
    found = [word.partition("=")[2] for word in words if word.startswith("NOISY_STUDENT_API_KEY=")]
    return found[0] if found else ""


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_compose_files_fleet_starts_serves_behind_one_address_and_ends(tmp_path: Path) -> None:
    with running_fleet(tmp_path) as fleet:
        pids = fleet.pids()
        folders = write_folders(fleet.directory / "datasets")
        fleet.service.register("labeled", "labeled", folders["labeled"])
        before = {name: fleet.service.get("/readyz")["status"] for name in ("once", "twice")}
        killed = fleet.kill("api-1")
        after = [fleet.service.client.get("/api/v1/datasets").status_code for _ in range(20)]
        fleet.wait_for_another("api-1", killed)
        unpromoted = fleet.service.client.post("/predict", content=b"x", headers={"Content-Type": "application/octet-stream"})
        workers = fleet.service.get("/api/v1/workers")["items"]

    assert set(pids) == MEMBERS
    assert set(before.values()) == {"ready"}
    assert set(after) == {200}
    assert unpromoted.status_code == 503
    assert len([worker for worker in workers if worker["alive"]]) == 3
    assert fleet.runner.returncode == 0
    assert [name for name, pid in pids.items() if is_there(pid)] == []


def outcome_of(service: Service) -> dict[str, Any]:
    """What the newest run made, down to weights, metrics and selected images, and under which recorded conditions."""
    run = service.get("/api/v1/runs")["items"][0]
    assert run["status"] == "completed", run
    lineage = service.get(f"/api/v1/runs/{run['id']}/lineage")["generations"]
    generations = [service.get(f"/api/v1/generations/{entry['generation_id']}") for entry in lineage]
    sets = [iteration["pseudo_label_set_id"] for iteration in run["iterations"] if iteration["pseudo_label_set_id"]]
    return {
        "runtime": run["runtime"],
        "generations": [(entry["iteration"], entry["role"]) for entry in lineage],
        "digests": [generation["digest"] for generation in generations],
        "metrics": [
            {split: {name: found["metrics"][split][name] for name in ("top1", "nll", "ece")} for split in ("validation", "test")}
            for found in generations
        ],
        "selected": [selected_items(service, set_id) for set_id in sets],
    }


def selected_items(service: Service, set_id: str) -> list[tuple[Any, ...]]:
    """Every guess of the set: image, class, confidence, and how often the student saw it."""
    found: list[tuple[Any, ...]] = []
    page: dict[str, Any] = {"next_cursor": None}
    while not found or page["next_cursor"]:
        page = service.get(f"/api/v1/pseudo-label-sets/{set_id}/items", limit=200, **({"cursor": page["next_cursor"]} if found else {}))
        found += [(item["key"], item["class_name"], item["confidence"], item["repeat"]) for item in page["items"]]
    return found


def start_demo(service: Service, directory: Path) -> subprocess.Popen[bytes]:
    """`noisy-student demo` against a running service, whose dataset root is `directory`'s folder `datasets`."""
    command = [str(BIN / "noisy-student"), "--url", service.url, "demo", "--directory", str(directory), "--iterations", "2"]
    key = str(service.client.headers["Authorization"]).removeprefix("Bearer ")
    with (directory.parent / "demo.log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "NOISY_STUDENT_API_KEY": key}, stdout=log, stderr=log)


def finish_demo(demo: subprocess.Popen[bytes], directory: Path) -> None:
    assert demo.wait(900) == 0, (directory.parent / "demo.log").read_text()


@pytest.mark.long
def test_each_member_killed_in_turn_during_the_demo_changes_nothing_but_time(tmp_path: Path) -> None:
    with embedded(tmp_path, roots=tmp_path / "data" / "datasets") as service:
        finish_demo(start_demo(service, tmp_path / "data"), tmp_path / "data")
        undisturbed = outcome_of(service)

    with running_fleet(tmp_path, "--environment", "NOISY_STUDENT_LEASE_SECONDS=6") as fleet:
        demo = start_demo(fleet.service, fleet.directory)
        [run] = wait_until(lambda: fleet.service.get("/api/v1/runs")["items"], seconds=120, what="the demo's run")
        during = []
        for place, name in enumerate(sorted(MEMBERS)):
            fleet.wait_for_events(run["id"], beyond=place * EVENTS_BETWEEN_KILLS)
            pid = fleet.kill(name)
            during.append((name, fleet.service.get(f"/api/v1/runs/{run['id']}")["status"]))
            fleet.wait_for_another(name, pid)
        finish_demo(demo, fleet.directory)
        disturbed = outcome_of(fleet.service)

    assert during == [(name, "active") for name in sorted(MEMBERS)]
    assert disturbed == undisturbed
