"""The migrations make the tables that the code speaks of."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from core import lifecycle
from core.db.schema import check_schema, current_revision, migrate, newest_revision
from core.db.session import Database
from core.db.tables import Base
from core.errors import SchemaMismatch

DESCENDING = {"ix_jobs_claim", "ix_jobs_set"}


def test_the_migrations_make_exactly_the_tables_of_the_code(database: Database) -> None:
    def can_be_compared(_object: object, name: str | None, kind: str, _reflected: bool, _other: object) -> bool:
        # SQLite's own description of an index does not tell which columns descend.
        return not (database.is_sqlite and kind == "index" and name in DESCENDING)

    options = {"compare_type": True, "render_as_batch": database.is_sqlite, "include_object": can_be_compared}
    with database.engine().connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)

    assert difference == []


def test_sqlite_too_has_its_jobs_in_the_order_of_claims(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.reading() as session:
        query = sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND name IN ('ix_jobs_claim', 'ix_jobs_set')")
        found = dict(session.execute(query).all())
    database.close()

    assert {name for name, text in found.items() if text.endswith("priority DESC, id)")} == DESCENDING


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("jobs", "status", lifecycle.JOB_STATUSES),
        ("jobs", "kind", lifecycle.JOB_KINDS),
        ("iterations", "phase", lifecycle.PHASES),
        ("runs", "status", lifecycle.RUN_STATUSES),
        ("dataset_versions", "status", lifecycle.VERSION_STATUSES),
        ("pseudo_label_sets", "status", lifecycle.SET_STATUSES),
        ("generations", "role", lifecycle.GENERATION_ROLES),
    ],
)
def test_the_database_itself_refuses_other_words(database: Database, table: str, column: str, words: tuple[str, ...]) -> None:
    with database.reading() as session:
        checks = sa.inspect(session.connection()).get_check_constraints(table)

    [text] = [str(check["sqltext"]) for check in checks if check["name"] == f"ck_{table}_{column}"]
    assert set(re.findall(r"'([^']+)'", text)) == set(words)


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)

    assert current_revision(database) == newest_revision()


def test_a_database_of_another_version_is_refused(database: Database) -> None:
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))

    with pytest.raises(SchemaMismatch, match="v9999"):
        check_schema(database)
