"""Services that several rooms' tests need: real ones, started on first use. A missing one fails the test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from core.db.schema import migrate
from core.db.session import Database
from core.settings import Settings
from tests.builders_services import create_database, running_postgresql, running_redis


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Folder of the socket of a PostgreSQL server with a migrated template database."""
    with running_postgresql() as directory:
        url = create_database(directory, "migrated")
        database = Database(Settings(database_url=url).resolved_database_url)
        migrate(database)
        database.close()
        yield directory


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.sqlite3"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.close()
    return path


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """URL of a migrated SQLite file of this test's own."""
    path = tmp_path / "rows.sqlite3"
    shutil.copyfile(migrated_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgresql_url(postgresql: str) -> str:
    """URL of a migrated PostgreSQL database of this test's own."""
    return create_database(postgresql, f"test_{uuid4().hex}", template="migrated")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Every test that takes this runs twice: on SQLite and on PostgreSQL, each with a migrated database of its own."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The same, opened."""
    opened = Database(Settings(database_url=database_url).resolved_database_url)
    yield opened
    opened.close()


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A Redis server of this test's own, so that flushing it disturbs nobody."""
    with running_redis() as url:
        yield url
