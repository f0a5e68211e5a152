"""`noisy-student up`: everything on this machine in one command.

A small parent holds the data directory's lock, brings the database up to date, makes the first admin key, and keeps two children
alive: the API and the worker. `kill -9` of the parent takes them down too, so that nothing half-alive stays behind.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer

from cli.invocation import Invocation, get_invocation
from cli.processes import Service, hold_lock
from core.db.api_keys import create_api_key
from core.db.schema import MIGRATION_SECONDS, check_schema, newest_revision
from core.db.schema import migrate as bring_up_to_date
from core.db.session import Database
from core.db.tables import ApiKey
from core.errors import DataDirectoryRefused, SetupError
from core.settings import Settings
from core.storage.digests import fsync_directory
from ml.sources import locate


def up(
    context: typer.Context,
    *,
    port: Annotated[int | None, typer.Option(help="Port of the API [default: 8000].", min=1, max=65535)] = None,
    host: Annotated[str | None, typer.Option(help="Address of the API [default: 127.0.0.1].")] = None,
    dataset_root: Annotated[
        list[str] | None,
        typer.Option(help="A folder or s3://BUCKET/PREFIX below which datasets may lie; may be repeated. Added to the data directory's."),
    ] = None,
) -> int:
    """Start everything on this machine: API, worker, housekeeping. Ctrl-C stops it, and nothing is lost."""
    invocation = get_invocation(context)
    _put_into_environment(port=port, host=host, dataset_roots=dataset_root)
    # Through the environment, because the children read their settings there.
    settings = invocation.settings
    prepare_data_directory(settings)
    with hold_lock(settings):
        service = Service(settings, invocation.output)
        service.check_port()
        open_database(settings, invocation)
        return service.run()


def migrate(context: typer.Context) -> None:
    """Bring the database to this version's schema and make the first admin key: for a fleet, where no `up` does it."""
    invocation = get_invocation(context)
    settings = invocation.settings
    prepare_data_directory(settings)
    open_database(settings, invocation)
    revision = newest_revision()
    invocation.output.result({"revision": revision}, f"the database has schema {revision}")


def _put_into_environment(*, port: int | None, host: str | None, dataset_roots: list[str] | None) -> None:
    given: dict[str, str] = {}
    if port is not None:
        given["PORT"] = str(port)
    if host is not None:
        given["HOST"] = host
    if dataset_roots:
        before = os.environ.get("NOISY_STUDENT_DATASET_ROOTS")
        given["DATASET_ROOTS"] = ":".join([*([before] if before else []), *(locate(root) for root in dataset_roots)])
    os.environ.update({f"NOISY_STUDENT_{name}": value for name, value in given.items()})


def prepare_data_directory(settings: Settings, *, restoring: bool = False) -> None:
    """Make the folders; DataDirectoryRefused when that is not possible, or when a restore into them was cut off."""
    directory = settings.data_directory
    if not restoring and settings.restore_marker.exists():
        backup = settings.restore_marker.read_text(encoding="utf-8").strip()
        raise DataDirectoryRefused(f"a restore into {directory} was not finished: run `noisy-student restore {backup}` again")
    probe = directory / f".writable-{os.getpid()}"
    try:
        for folder in (directory, directory / "datasets", settings.objects_directory, settings.attempts_directory):
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        message = f"the data directory {directory} is not writable: {error.strerror}; name another with --data-directory"
        raise DataDirectoryRefused(message) from error


def open_database(settings: Settings, invocation: Invocation) -> None:
    """Migrate it, and make the first admin key when there is none yet."""
    database = _open(settings)
    try:
        _migrate(database)
        secret = make_first_key(database, settings) if settings.require_keys else None
    finally:
        database.close()
    if secret is not None:
        invocation.output.say(f"admin key, shown this once and kept in {settings.key_file}:\n  {secret}")


@contextmanager
def existing_database(settings: Settings) -> Iterator[Database]:
    """The service's database, for who reads much of it in one snapshot; SetupError when it is not there, or not this version's."""
    if settings.database_url is None and not Path(settings.resolved_database_url.removeprefix("sqlite:///")).exists():
        raise SetupError(f"there is no database in {settings.data_directory}; name the right one with --data-directory")
    database = Database(settings.resolved_database_url, idle_transaction_seconds=3600)
    try:
        check_schema(database, exactly=True)
        yield database
    except sa.exc.SQLAlchemyError as error:
        raise SetupError(f"the database cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        database.close()


def _open(settings: Settings) -> Database:
    try:
        return Database(settings.resolved_database_url, silence_seconds=MIGRATION_SECONDS + 5)
    except (sa.exc.ArgumentError, ImportError) as error:
        # An address that SQLAlchemy cannot read, or a driver that is not installed.
        raise SetupError(f"NOISY_STUDENT_DATABASE_URL cannot be opened: {error}") from error


def _migrate(database: Database) -> None:
    try:
        bring_up_to_date(database)
    except sa.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        place = sa.make_url(database.url).render_as_string(hide_password=True)
        raise SetupError(f"the database {place} cannot be opened: {reason}") from error


def make_first_key(database: Database, settings: Settings) -> str | None:
    """Insert an admin key when no key opens the service yet; returns its secret, which is also in `settings.key_file`."""
    with database.transaction() as session:
        if not database.is_sqlite:
            # Two that migrate one database at a moment make one key.
            session.execute(sa.text("SELECT pg_advisory_xact_lock(748202)"))
        if session.scalar(sa.select(ApiKey.id).where(ApiKey.revoked_at.is_(None)).limit(1)) is not None:
            return None
        _, secret = create_api_key(session, name="first admin key", scopes=["admin"])
        # Before the commit: a key in the table whose secret nobody knows would lock everybody out.
        write_private(settings.key_file, secret + "\n")
    return secret


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, complete or not at all, also after a power cut."""
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_directory(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataDirectoryRefused(f"cannot write {path}: {error.strerror}") from error
