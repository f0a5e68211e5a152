"""The database's schema against the code's: bring it up to date, or say that it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from core.db.session import Database
from core.errors import SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    return config


def newest_revision() -> str:
    """The revision that this code was written for."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise SchemaMismatch(f"no migrations in {MIGRATIONS}")
    return head


def current_revision(database: Database) -> str | None:
    """The revision that the database has; None for an empty one."""
    with database.reading() as session:
        if not sa.inspect(session.connection()).has_table("alembic_version"):
            return None
        revision: str | None = session.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
        return revision


def migrate(database: Database, *, to: str = "head") -> None:
    """Bring the database to the newest revision, or `to` an older one; nothing happens when it is there.

    Two callers at once take turns. SchemaMismatch for a revision that this version does not know.
    """
    from alembic import command
    from alembic.util import CommandError

    with database.engine().begin() as connection:
        if not database.is_sqlite:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(748201)"))
        config = _config()
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, to)
        except CommandError as error:
            raise SchemaMismatch(f"schema {to} is not known to this version, which has {newest_revision()}: {error}") from error


def check_schema(database: Database) -> None:
    """SchemaMismatch when the database is older or newer than the code."""
    current, newest = current_revision(database), newest_revision()
    if current != newest:
        raise SchemaMismatch(
            f"the database has schema {current}, this version needs {newest}; run `noisy-student migrate` with the newer version"
        )
