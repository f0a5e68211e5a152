"""Only core/db/session.py commits: a handler opens one transaction block, and what it wrote is there when it answers."""

from __future__ import annotations

import ast

from tests.architecture.sources import Source, room_sources

# Migrations change the schema on a connection of their own, before any session exists.
MAY_BEGIN = {"core.db.session", "core.db.schema", "migrations.env"}


def calls(source: Source) -> list[tuple[str, int]]:
    """Last name and line of every call in the file."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((name, node.lineno))
    return found


def test_only_the_session_module_begins_and_commits() -> None:
    found = {
        f"{source.path}:{line} {name}"
        for source in room_sources()
        if source.module not in MAY_BEGIN
        for name, line in calls(source)
        if name in {"begin", "begin_nested", "commit", "rollback"}
    }

    assert found == set()


def test_only_the_session_module_makes_sessions_and_engines() -> None:
    found = {
        f"{source.path}:{line} {name}"
        for source in room_sources()
        if source.module not in MAY_BEGIN
        for name, line in calls(source)
        if name in {"Session", "sessionmaker", "create_engine"}
    }

    assert found == set()
