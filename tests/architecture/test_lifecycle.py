"""The lifecycle is said in four places: core.lifecycle, the CHECK constraints, the first migration, the glossary with its picture."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from core import lifecycle
from core.db.tables import Base
from tests.architecture.sources import REPOSITORY

WORDS = {
    "JOB_STATUSES": lifecycle.JOB_STATUSES,
    "JOB_KINDS": lifecycle.JOB_KINDS,
    "STEPS": lifecycle.STEPS,
    "PHASES": lifecycle.PHASES,
    "RUN_STATUSES": lifecycle.RUN_STATUSES,
    "VERSION_STATUSES": lifecycle.VERSION_STATUSES,
    "SET_STATUSES": lifecycle.SET_STATUSES,
    "GENERATION_ROLES": lifecycle.GENERATION_ROLES,
    "ERROR_CLASSES": lifecycle.ERROR_CLASSES,
    "SCOPES": lifecycle.SCOPES,
}
CONSTRAINED = {
    ("jobs", "status"): lifecycle.JOB_STATUSES,
    ("jobs", "kind"): lifecycle.JOB_KINDS,
    ("iterations", "phase"): lifecycle.PHASES,
    ("runs", "status"): lifecycle.RUN_STATUSES,
    ("dataset_versions", "status"): lifecycle.VERSION_STATUSES,
    ("pseudo_label_sets", "status"): lifecycle.SET_STATUSES,
    ("generations", "role"): lifecycle.GENERATION_ROLES,
}


@pytest.mark.parametrize("name", WORDS)
def test_the_glossary_names_every_word(name: str) -> None:
    section = (REPOSITORY / "docs/glossary.md").read_text(encoding="utf-8").split("## The lifecycle")[1]

    assert set(WORDS[name]) - set(re.findall(r"`([^`]+)`", section)) == set()


@pytest.mark.parametrize(("table", "column"), CONSTRAINED)
def test_a_check_constraint_repeats_the_words(table: str, column: str) -> None:
    checks = [
        str(constraint.sqltext)
        for constraint in Base.metadata.tables[table].constraints
        if isinstance(constraint, sa.CheckConstraint) and str(constraint.sqltext).startswith(f"{column} IN ")
    ]

    assert [tuple(re.findall(r"'([^']+)'", check)) for check in checks] == [CONSTRAINED[table, column]]


def test_the_picture_shows_every_status_of_a_job_and_a_run_and_every_phase() -> None:
    picture = (REPOSITORY / "docs/pictures/lifecycle.svg").read_text(encoding="utf-8")
    shown = set(re.findall(r">([a-z]+)</text>", picture))

    assert {*lifecycle.JOB_STATUSES, *lifecycle.RUN_STATUSES, *lifecycle.PHASES} - shown == set()


def test_every_move_leads_to_a_known_word_and_terminal_statuses_are_left_by_a_retry_only() -> None:
    for moves, words in ((lifecycle.JOB_MOVES, lifecycle.JOB_STATUSES), (lifecycle.RUN_MOVES, lifecycle.RUN_STATUSES)):
        assert set(moves) == set(words)
        assert {target for targets in moves.values() for target in targets} <= set(words)
    for status in lifecycle.JOB_TERMINAL:
        assert set(lifecycle.JOB_MOVES[status]) <= {"queued"}
