"""A short chaos run of each database, as the command runs it: whatever is accepted is there at the end, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.plan import KINDS, draw_plan, kinds_of

MINUTES = 0.2
SHORT = {
    "sqlite": ("worker killed", "commit lost", "promotion killed", "everything killed"),
    "postgresql": ("database connections reset", "message delivered ×100", "messages dropped", "connections terminated", "commit lost"),
}


def run_chaos(database: str, directory: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    report = directory / "report"
    command = [sys.executable, "-m", "tests.faults", "--seed", "7", "--minutes", str(MINUTES), "--database", database]
    command += ["--no-training", "--workers", "2", "--report", str(report), "--logs", str(directory / "logs")]
    for name in SHORT[database]:
        command += ["--only", name]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=dict(os.environ), capture_output=True, text=True, check=False)
    [outcome] = json.loads(report.with_suffix(".json").read_text())["outcomes"] if report.with_suffix(".json").exists() else [{}]
    return done, outcome


@pytest.mark.parametrize("database", SHORT)
def test_through_a_few_faults_nothing_is_lost_and_nothing_doubled(database: str, tmp_path: Path) -> None:
    done, outcome = run_chaos(database, tmp_path)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert outcome["struck"]
    assert {one["kind"] for one in outcome["struck"]} <= set(SHORT[database])
    assert outcome["accepted"]["ingest"] > 5


def test_every_kind_has_a_name_of_its_own_and_can_happen_somewhere() -> None:
    names = [kind.name for kind in KINDS]

    assert len(set(names)) == len(names)
    there = {kind for database in SHORT for storage in ("folder", "bucket") for kind in kinds_of(database, storage, trains=True)}
    assert there == set(KINDS)


def test_after_n_rounds_every_kind_has_had_n_turns_and_the_seed_draws_the_order() -> None:
    kinds = kinds_of("postgresql", "bucket", trains=True)

    plans = [[next(plan) for _ in range(5 * len(kinds))] for plan in (draw_plan(kinds, seed, "postgresql") for seed in (1, 1, 2))]

    assert {plans[0].count(kind) for kind in kinds} == {5}
    assert plans[0] == plans[1] != plans[2]
