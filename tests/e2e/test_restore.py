"""A backup of a busy service, brought back elsewhere over the other database: the run that was going on goes on to the same bits."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.builders_services import create_database
from tests.e2e.conftest import Undisturbed, wait_for_run
from tests.e2e.processes import BIN, Service, embedded, start_embedded
from tests.e2e.test_fleet import outcome_of
from tests.e2e.test_kills import wait_for_checkpoint
from tests.e2e.test_whole_loop import start_run

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


def noisy_student(service: Service, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command beside the service, on its settings unless others are given."""
    command = [str(BIN / "noisy-student"), *arguments]
    return subprocess.run(
        command, env=service.processes.environment | environment, capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def registering(service: Service, folder: Path) -> Iterator[list[str]]:
    """Somebody who asks for one reading after the other; the jobs that were answered with 202."""
    over, accepted = threading.Event(), []

    def go_on() -> None:
        number = 0
        while not over.wait(0.2):
            number += 1
            body = {"name": f"meanwhile-{number}", "kind": "evaluation", "source": {"folder": str(folder)}}
            with httpx.Client(base_url=service.url, headers=service.client.headers, timeout=30, trust_env=False) as client:
                answer = client.post("/api/v1/datasets", json=body)
            assert answer.status_code == 202, answer.text
            accepted.append(answer.json()["id"])

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield accepted
    finally:
        over.set()
        thread.join()


@pytest.fixture
def database_urls(request: pytest.FixtureRequest, postgresql: str) -> tuple[dict[str, str], dict[str, str]]:
    """(here, there): variables of a service on SQLite and of one on an empty PostgreSQL database, or the other way around."""
    there = {"NOISY_STUDENT_DATABASE_URL": create_database(postgresql, f"empty_{uuid4().hex}")}
    return ({}, there) if request.param == "to PostgreSQL" else (there, {})


@pytest.mark.parametrize("database_urls", ["to PostgreSQL", "to SQLite"], indirect=True)
def test_a_run_that_was_backed_up_under_load_goes_on_elsewhere_and_ends_with_the_undisturbed_runs_bits(
    tmp_path: Path, undisturbed: Undisturbed, database_urls: tuple[dict[str, str], dict[str, str]]
) -> None:
    kept, (here, there) = tmp_path / "kept", database_urls
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    with embedded(tmp_path / "here", roots=undisturbed.root, **here) as service:
        run = start_run(service, undisturbed.folders, iterations=1, recipe=undisturbed.recipe)
        wait_for_checkpoint(service, run["id"], attempt=1)
        with registering(service, undisturbed.folders["test"]) as accepted:
            made = noisy_student(service, "backup", str(kept))
        during = run_of(service, run["id"])
        elsewhere = {"NOISY_STUDENT_DATA_DIRECTORY": str(tmp_path / "there" / "data"), "NOISY_STUDENT_DATABASE_URL": "", **there}
        brought = noisy_student(service, "restore", str(kept), **elsewhere)
        again = noisy_student(service, "restore", str(kept), **elsewhere)
        verified = noisy_student(service, "doctor", "--verify", **elsewhere)

    restored = start_embedded(tmp_path / "there", roots=undisturbed.root, **there)
    try:
        restored.use_key((kept / "admin.key").read_text(encoding="utf-8").strip())
        before = run_of(restored, run["id"])
        wait_for_run(restored, run["id"], seconds=400)
        outcome = outcome_of(restored)
        jobs = {job["id"]: restored.finished_job(job["id"])["status"] for job in restored.get("/api/v1/jobs", limit=200)["items"]}
        restored.verify()
    finally:
        restored.close()

    assert [made.returncode, brought.returncode, verified.returncode] == [0, 0, 0], made.stderr + brought.stderr + verified.stderr
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)
    assert (during["status"], before["status"]) == ("active", "active")
    assert accepted
    # Whatever was in the backup came to its end.
    assert set(jobs.values()) == {"succeeded"}
    assert outcome == undisturbed.outcome


def run_of(service: Service, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = service.get(f"/api/v1/runs/{run_id}")
    return found
