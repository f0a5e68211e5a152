"""The migrations make the tables that the code speaks of."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from core import lifecycle
from core.db.schema import _config, check_schema, current_revision, migrate, newest_revision
from core.db.session import Database
from core.db.tables import Base
from core.errors import SchemaMismatch


def test_the_migrations_make_exactly_the_tables_of_the_code(database: Database) -> None:
    with database.engine().connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "render_as_batch": database.is_sqlite})
        difference = compare_metadata(context, Base.metadata)

    assert difference == []


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


def test_the_newest_migration_can_be_taken_back(database: Database) -> None:
    """For a person who tries it; a running service only ever moves on."""
    config = _config()
    with database.engine().begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")
    before = current_revision(database)

    migrate(database)

    assert before not in (None, newest_revision())
    assert current_revision(database) == newest_revision()


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)

    assert current_revision(database) == newest_revision()


def test_a_database_of_another_version_is_refused(database: Database) -> None:
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = 'v9999'"))

    with pytest.raises(SchemaMismatch, match="v9999"):
        check_schema(database)
