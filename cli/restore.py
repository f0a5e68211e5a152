"""`noisy-student restore`: a backup's files and rows into an empty place, on SQLite or PostgreSQL, in a folder or in S3."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from sqlalchemy.orm import Session

from cli.backup import ROWS_AT_ONCE, read_description, telling
from cli.invocation import get_invocation
from cli.output import Output
from cli.up import prepare_data_directory, write_private
from core.db.schema import current_revision, migrate
from core.db.session import Database
from core.errors import DataDirectoryRefused, SetupError, StorageDamaged
from core.settings import Settings
from core.storage import LocalStorage, Storage, make_storage

NOT_RESTORED = ("singleton_leases",)
"""Who kept house when the backup was made is nobody's business here."""


def restore(
    context: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="A folder that `noisy-student backup` wrote.")],
) -> None:
    """Bring a backup back, into an empty data directory and database. Runs that were going on go on."""
    invocation = get_invocation(context)
    settings, output = invocation.settings, invocation.output
    facts = read_description(folder)
    refuse_what_is_there(settings, folder)
    prepare_data_directory(settings, restoring=True)
    marker = settings.restore_marker
    write_private(marker, f"{folder.resolve()}\n")
    _restore_files(folder, make_storage(settings), output, folder / facts["rows_folder"])
    database = Database(settings.resolved_database_url, idle_transaction_seconds=3600)
    try:
        counts = _restore_rows(database, folder / facts["rows_folder"], facts)
    except sa.exc.SQLAlchemyError as error:
        raise SetupError(f"the rows could not be written: {str(error).splitlines()[0]}") from error
    finally:
        database.close()
    if (folder / "admin.key").exists():
        write_private(settings.key_file, (folder / "admin.key").read_text(encoding="utf-8"))
    marker.unlink()
    result = {"rows": counts, "num_files": facts["num_files"]}
    output.result(
        result, f"{sum(counts.values())} rows and {facts['num_files']} files were restored; `noisy-student doctor --verify` looks at them"
    )


def refuse_what_is_there(settings: Settings, folder: Path) -> None:
    """DataDirectoryRefused when rows or files would mix with others; a restore of the same backup that was cut off may go on."""
    directory, marker = settings.data_directory, settings.restore_marker
    if marker.exists():
        before = marker.read_text(encoding="utf-8").strip()
        if before != str(folder.resolve()):
            raise DataDirectoryRefused(f"{directory} holds a half-done restore of {before}; finish that one, or name an empty directory")
    elif directory.exists():
        found = sorted(path.name for path in directory.iterdir() if path.name != "datasets")
        if found:
            raise DataDirectoryRefused(f"the data directory {directory} is not empty ({', '.join(found[:5])}); restore into a new one")
    if settings.database_url is not None and not marker.exists():
        database = Database(settings.resolved_database_url)
        try:
            revision = current_revision(database)
        except sa.exc.SQLAlchemyError as error:
            raise SetupError(f"the database does not answer: {str(error).splitlines()[0]}") from error
        finally:
            database.close()
        if revision is not None:
            raise DataDirectoryRefused("the database has tables already; restore into a new one")


def _restore_files(folder: Path, storage: Storage, output: Output, rows: Path) -> None:
    source = LocalStorage(folder / "objects")
    digests = sorted({row["digest"] for row in _read_rows(rows / "stored_files.jsonl.gz")})
    for digest in telling(digests, output, "files restored"):
        kept = storage.put(source.fetch(digest))
        if kept["digest"] != digest:
            storage.remove(kept["digest"])
            raise StorageDamaged(f"the backup's file {digest} was altered: its content has digest {kept['digest']}", digest=digest)


def _restore_rows(database: Database, rows: Path, facts: dict[str, Any]) -> dict[str, int]:
    """All or nothing: at the backup's own schema, then upgraded to this version's."""
    migrate(database, to=facts["schema"])
    there = sa.MetaData()
    counts: dict[str, int] = {}
    with database.transaction() as session:
        there.reflect(session.connection())
        if session.scalar(sa.select(sa.func.count()).select_from(there.tables["stored_files"])):
            # A restore before this one was cut off after its last step.
            return dict(facts["rows"])
        for table in there.sorted_tables:
            path = rows / f"{table.name}.jsonl.gz"
            if table.name in NOT_RESTORED or not path.exists():
                continue
            counts[table.name] = _insert_rows(session, table, path)
            if counts[table.name] != facts["rows"][table.name]:
                raise SetupError(f"{path} has {counts[table.name]} rows, backup.json says {facts['rows'][table.name]}: it was altered")
        if not database.is_sqlite:
            session.execute(sa.text("SELECT setval(pg_get_serial_sequence('outbox', 'id'), (SELECT coalesce(max(id), 1) FROM outbox))"))
    migrate(database)
    return counts


def _insert_rows(session: Session, table: sa.Table, path: Path) -> int:
    for column in table.columns:
        if isinstance(column.type, sa.JSON):
            # A reflected type would write None as the JSON word.
            column.type.none_as_null = True
    moments = [column.name for column in table.columns if isinstance(column.type, sa.DateTime)]
    number = 0
    lines = _read_rows(path)
    while batch := list(islice(lines, ROWS_AT_ONCE)):
        for row in batch:
            row.update({name: datetime.fromisoformat(row[name]) for name in moments if row[name] is not None})
        session.execute(sa.insert(table), batch)
        number += len(batch)
    return number


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, EOFError, ValueError) as error:
        raise SetupError(f"{path} cannot be read: {error}") from error
