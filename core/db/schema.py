"""The database's schema against the code's: bring it up to date, or say that it is not.

A revision is called `0004`, or `0004_serves_0003`: then code that was written for 0003 goes on over it (docs/decisions/0025).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from core.db.session import Database
from core.errors import SchemaBusy, SchemaMismatch

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
LOCK_SECONDS = 2.0
"""How long a migration waits for a table that is in use: everybody else's statements on that table wait behind it."""
TRIES = 40
"""Of one migration that finds its tables in use, with a second between them: two minutes."""
MIGRATION_SECONDS = 3600.0
"""What one statement of a migration may take: an index over many millions of rows."""
_IN_USE = ("55P03", "40P01")
"""PostgreSQL's lock_not_available and deadlock_detected."""
_REVISION = re.compile(r"(\d{4})(?:_serves_(\d{4}))?")


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


@cache
def newest_revision() -> str:
    """The revision that this code was written for."""
    head = _scripts().get_current_head()
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


def serves(revision: str, code: str) -> bool:
    """Whether code that was written for `code` goes on over a database of `revision`: the same one, or a newer one that says so."""
    if revision == code:
        return True
    there, wanted = _REVISION.fullmatch(revision), _REVISION.fullmatch(code)
    return there is not None and wanted is not None and there[2] is not None and there[2] <= wanted[1] < there[1]


def find_mismatch(revision: str | None) -> str | None:
    """Why this code cannot work over a database of that revision, in words; None when it can."""
    if revision is not None and serves(revision, newest_revision()):
        return None
    return f"the database has schema {revision}, this version needs {newest_revision()}"


def check_schema(database: Database, *, exactly: bool = False) -> None:
    """SchemaMismatch when this code cannot work over the database; with `exactly` also over one that has more than this code knows."""
    current = current_revision(database)
    problem = find_mismatch(current)
    if problem is None and exactly and current != newest_revision():
        problem = f"the database has schema {current}, this version knows {newest_revision()} and would leave out what is newer"
    if problem is not None:
        raise SchemaMismatch(f"{problem}; run `noisy-student migrate` with the newer version")


def migrate(database: Database, *, to: str = "head", lock_seconds: float = LOCK_SECONDS, tries: int = TRIES) -> None:
    """Bring the database to the newest revision, or `to` an older one; nothing happens when it is there.

    One transaction a migration; two callers at once take turns. A migration that finds its tables in use for `lock_seconds`, or meets a
    deadlock with the running service, steps back, lets the service go on and tries again: SchemaBusy after so many `tries`. What was
    migrated before stays. SchemaMismatch for a revision that this version does not know.
    """
    left = tries
    while True:
        try:
            if not _migrate_once(database, to, lock_seconds):
                return
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in _IN_USE:
                raise
            left -= 1
            if left == 0:
                raise SchemaBusy(
                    f"the schema could not be changed in {tries} tries: running processes use its tables all the time "
                    f"({str(error.orig).splitlines()[0]}). What was migrated so far stays; run `noisy-student migrate` again"
                ) from error
            # Not in step with what is in the way.
            time.sleep(random.uniform(0.5, 1.5) * min(1.0, lock_seconds))
        else:
            left = tries


def _migrate_once(database: Database, to: str, lock_seconds: float) -> bool:
    """The next migration, in a transaction of its own; False when there is none left."""
    from alembic import command

    with database.engine().begin() as connection:
        if not database.is_sqlite:
            connection.execute(sa.text(f"SET LOCAL statement_timeout = {round(MIGRATION_SECONDS * 1000)}"))
            # Who migrates at the same moment is waited for; only then does the patience with tables begin.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(748201)"))
            connection.execute(sa.text(f"SET LOCAL lock_timeout = {round(lock_seconds * 1000)}"))
        with _unknown_revisions(to):
            revision = _next_revision(connection, to)
            if revision is None:
                return False
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    return True


def _next_revision(connection: sa.Connection, to: str) -> str | None:
    from alembic.migration import MigrationContext
    from alembic.script.revision import RangeNotAncestorError

    current = MigrationContext.configure(connection).get_current_revision()
    try:
        ahead = [script.revision for script in _scripts().iterate_revisions(to, current or "base")]
    except RangeNotAncestorError:
        # It is beyond that one already.
        return None
    return ahead[-1] if ahead else None


@contextmanager
def _unknown_revisions(to: str) -> Iterator[None]:
    from alembic.script.revision import RevisionError
    from alembic.util import CommandError

    try:
        yield
    except (CommandError, RevisionError) as error:
        raise SchemaMismatch(
            f"schema {to}, or the one that the database has, is not known to this version, which has {newest_revision()}: {error}"
        ) from error
