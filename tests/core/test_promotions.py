"""Aliases move only from what the caller saw, and their history replays to where they point."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.db.generations import delete_generation, list_referrers, register_generation
from core.db.jobs import NewJob, claim, enqueue
from core.db.promotions import get_alias, list_promotions, move_alias, rollback_target
from core.db.session import Database
from core.errors import Conflict, NotFound, PreconditionFailed, StillReferenced
from core.ids import new_id


def add_generation(database: Database) -> str:
    """A registered generation, as an import job makes it."""
    wanted = NewJob(kind="import", input={"folder": "/x", "name": "n"}, generation_id=new_id("generation"))
    with database.transaction() as session:
        enqueue(session, [wanted])
        job = claim(session, holder="w", capabilities=["cpu"], lease_seconds=60, job_id=wanted.id)
        assert job is not None
        metrics = {"role": "imported", "architecture": "test_resnet", "num_parameters": 1}
        files = {"model.safetensors": {"digest": "0" * 64, "num_bytes": 1}}
        return register_generation(session, job, {"metrics": metrics, "class_names": ["a", "b"], "files": files}).id


def move(database: Database, generation_id: str, *, seen: int | None, action: str = "promote") -> int:
    with database.transaction() as session:
        values: dict[str, Any] = {"expected_version": seen, "action": action, "actor": None}
        return move_alias(session, "production", generation_id, **values).version


def test_an_alias_moves_only_from_the_version_that_the_caller_saw(database: Database) -> None:
    one, two = add_generation(database), add_generation(database)
    assert move(database, one, seen=None) == 1

    for stale in (None, 0, 7):
        with pytest.raises(PreconditionFailed, match="read it again"):
            move(database, two, seen=stale)

    assert move(database, two, seen=1) == 2
    with database.reading() as session:
        assert get_alias(session, "production").generation_id == two


def test_rollbacks_go_back_one_promotion_each_and_end_at_the_first(database: Database) -> None:
    one, two, three = (add_generation(database) for _ in range(3))
    for version, generation_id in enumerate((one, two, three)):
        move(database, generation_id, seen=version or None)

    for version, expected in ((3, two), (4, one)):
        with database.reading() as session:
            target = rollback_target(session, "production")
        assert target == expected
        move(database, target, seen=version, action="rollback")

    with database.reading() as session, pytest.raises(Conflict, match="no earlier generation"):
        rollback_target(session, "production")


def test_nothing_promoted_is_not_found(database: Database) -> None:
    with database.reading() as session, pytest.raises(NotFound, match="nothing was promoted"):
        get_alias(session, "production")


def test_a_promoted_generation_cannot_be_deleted_and_another_can(database: Database) -> None:
    promoted, other = add_generation(database), add_generation(database)
    move(database, promoted, seen=None)

    with database.transaction() as session:
        with pytest.raises(StillReferenced, match="alias production"):
            delete_generation(session, promoted)
        assert list_referrers(session, other) == []
        delete_generation(session, other)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["promote", "rollback"]), max_size=8))
def test_the_history_replays_to_the_alias(database: Database, actions: list[str]) -> None:
    alias = new_id("request")
    stack: list[str] = []
    generations = [add_generation(database) for _ in range(3)]

    for number, action in enumerate(actions):
        if action == "rollback" and len(stack) < 2:
            continue
        with database.transaction() as session:
            versions = [row.version for row in list_promotions(session, alias)]
            target = generations[number % 3] if action == "promote" else rollback_target(session, alias)
            move_alias(session, alias, target, expected_version=versions[-1] if versions else None, action=action, actor=None)
        stack = [*stack, target] if action == "promote" else stack[:-1]

    with database.reading() as session:
        history = list_promotions(session, alias)
        assert [row.version for row in history] == list(range(1, len(history) + 1))
        if history:
            assert get_alias(session, alias).generation_id == stack[-1] == history[-1].generation_id
