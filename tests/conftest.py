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
from tests.builders_services import S3Server, create_database, running_postgresql, running_redis, running_s3


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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A store for tests that leave it running; each takes buckets of its own."""
    with running_s3() as server:
        yield server


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the tests' stores, and no others that this machine may know."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.secret_key)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_url(s3_server: S3Server, s3_credentials: None) -> str:
    """A bucket of this test's own, whose credentials are in the environment."""
    return s3_server.make_bucket(f"bucket-{uuid4().hex}")
