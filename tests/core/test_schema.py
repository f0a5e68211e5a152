"""The migrations make the tables that the code speaks of."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from core import lifecycle
from core.db.schema import _config, _scripts, check_schema, current_revision, migrate, newest_revision, serves
from core.db.session import Database
from core.db.tables import Base
from core.errors import SchemaBusy, SchemaMismatch
from core.settings import Settings
from tests.builders_services import create_database, wait_until


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


def set_revision(database: Database, revision: str) -> None:
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


@pytest.mark.parametrize(
    ("revision", "code", "goes_on"),
    [
        ("0004", "0004", True),
        ("0004", "0003", False),
        ("0004_serves_0003", "0003", True),
        ("0004_serves_0003", "0002", False),
        ("0006_serves_0004", "0005_serves_0003", True),
        ("0006_serves_0005", "0004", False),
        ("0003", "0004_serves_0003", False),
        ("0004_serves_0003", "0005_serves_0004", False),
        ("v9999", "0003", False),
    ],
)
def test_older_code_goes_on_over_a_newer_schema_that_says_so_and_over_no_other(revision: str, code: str, goes_on: bool) -> None:
    assert serves(revision, code) is goes_on


def test_who_would_leave_out_what_is_newer_is_refused(database: Database) -> None:
    newest = newest_revision()[:4]
    set_revision(database, f"{int(newest) + 1:04}_serves_{newest}")

    check_schema(database)

    with pytest.raises(SchemaMismatch, match="would leave out what is newer"):
        check_schema(database, exactly=True)


def test_revisions_are_numbered_and_none_serves_older_code_than_the_one_before_it() -> None:
    names = [script.revision for script in _scripts().walk_revisions()][::-1]

    parts = [re.fullmatch(r"(\d{4})(?:_serves_(\d{4}))?", name) for name in names]

    assert [part and int(part[1]) for part in parts] == list(range(1, len(names) + 1))
    oldest = [part[2] or part[1] for part in parts if part]
    assert oldest == sorted(oldest)


@pytest.fixture
def empty_postgresql(postgresql: str) -> Iterator[Database]:
    """Without tables."""
    database = Database(Settings(database_url=create_database(postgresql, f"empty_{uuid4().hex}")).resolved_database_url)
    yield database
    database.close()


def test_migrators_at_one_moment_take_turns(empty_postgresql: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: migrate(empty_postgresql), range(4)))

    assert ends == [None] * 4
    assert current_revision(empty_postgresql) == newest_revision()


WAITING = "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database WHERE datname = current_database() AND NOT granted"


def count_waiting(database: Database) -> int:
    """Those who wait for a lock."""
    with database.reading() as session:
        return int(session.execute(sa.text(WAITING)).scalar_one())


def test_a_migration_that_finds_a_table_in_use_lets_others_pass_and_tries_again(empty_postgresql: Database) -> None:
    migrate(empty_postgresql, to="0001")
    migrator = threading.Thread(target=migrate, args=(empty_postgresql,), kwargs={"lock_seconds": 0.2})
    with empty_postgresql.transaction() as holder:
        holder.execute(sa.text("SELECT count(*) FROM jobs"))
        migrator.start()
        wait_until(lambda: count_waiting(empty_postgresql), what="a migration that waits")
        with empty_postgresql.transaction() as other:
            # It stands in the queue behind the migration, which must leave it long before the holder is done.
            other.execute(sa.text("SET LOCAL statement_timeout = 5000"))
            other.execute(sa.text("SELECT count(*) FROM jobs"))
        still_there = migrator.is_alive()
    migrator.join()

    assert still_there
    assert current_revision(empty_postgresql) == newest_revision()


def test_a_migration_that_meets_a_deadlock_tries_again_and_the_service_notices_nothing(empty_postgresql: Database) -> None:
    migrate(empty_postgresql, to="0001")
    migrator = threading.Thread(target=migrate, args=(empty_postgresql,), kwargs={"lock_seconds": 30})
    with empty_postgresql.transaction() as service:
        service.execute(sa.text("SET LOCAL deadlock_timeout = '1min'"))
        service.execute(sa.text("DELETE FROM jobs"))
        migrator.start()
        wait_until(lambda: count_waiting(empty_postgresql), what="a migration that waits for jobs and has locked workers")
        service.execute(sa.text("DELETE FROM workers"))
    migrator.join()

    assert current_revision(empty_postgresql) == newest_revision()


def test_a_migration_that_never_gets_its_table_gives_up_and_keeps_the_ones_before_it(empty_postgresql: Database) -> None:
    migrate(empty_postgresql, to="0001")
    with empty_postgresql.transaction() as holder:
        # Of the migrations after this one only 0003 needs that table for itself.
        holder.execute(sa.text("LOCK TABLE dataset_versions IN ROW EXCLUSIVE MODE"))

        with pytest.raises(SchemaBusy, match="could not be changed in 3 tries"):
            migrate(empty_postgresql, lock_seconds=0.05, tries=3)

    assert current_revision(empty_postgresql) == "0002"


def test_a_database_beyond_the_wanted_schema_stays_as_it_is(database: Database) -> None:
    migrate(database, to="0001")

    assert current_revision(database) == newest_revision()
