"""What several of these tests compare with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.loopback import Loopback
from tests.e2e.processes import Service, embedded, wait_until
from tests.e2e.test_fleet import outcome_of
from tests.e2e.test_whole_loop import RECIPE, start_run, write_folders

# Half a minute or more of training: time for a service to be replaced or to be brought elsewhere meanwhile.
TEACHER = {"steps": 1800, "batch_size": 18, "evaluate_every_steps": 500, "ema_decay": 0.9, "checkpoint_every_seconds": 1}


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run of one iteration that nothing happened to."""

    recipe: dict[str, Any]
    folders: dict[str, Path]
    root: Path
    """Of the folders."""
    outcome: dict[str, Any]


def wait_for_run(service: Service, run_id: str, *, seconds: float) -> None:
    """Until it is completed; every other end is an error."""

    def ended() -> bool:
        run = service.get(f"/api/v1/runs/{run_id}")
        assert run["status"] in ("active", "completed"), run
        return bool(run["status"] == "completed")

    wait_until(ended, seconds=seconds, what=f"the end of {run_id}")


@pytest.fixture(autouse=True)
def no_cluster_is_left_behind(tmp_path: Path) -> Iterator[None]:
    """Where tests run as root, a fleet's PostgreSQL keeps its files outside of the fleet's own directory, in a place named after it."""
    yield
    cluster = Loopback((tmp_path / "fleet").resolve(), {}, shares_data=True).postgres
    if not cluster.is_relative_to(tmp_path):
        shutil.rmtree(cluster.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same recipe and images bring every other run to the same weights and labels."""
    root, recipe = tmp_path_factory.mktemp("images"), {**RECIPE, "teacher": {"training": TEACHER}}
    folders = write_folders(root)
    with embedded(tmp_path_factory.mktemp("calm"), roots=root) as service:
        run = start_run(service, folders, iterations=1, recipe=recipe)
        wait_for_run(service, run["id"], seconds=600)
        return Undisturbed(recipe, folders, root, outcome_of(service))
