"""`noisy-student backup` and `restore`: all rows from one moment and every file that they name, as plain files that outlive versions.

    backup.json               what this is: versions, schema, moment, counts; written last, so that a folder without it is no backup
    rows-<moment>/*.jsonl.gz  one file a table, one row a line
    objects/ab/abcd…          the stored files, named by digest; a second backup into the same folder adds only what is new
    admin.key                 the first admin key, when the data directory has it

Images are not part of it: they lie where people put them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from cli.invocation import get_invocation
from cli.output import Output
from cli.up import existing_database, write_private
from core.db.schema import newest_revision
from core.db.session import AWAY, Database
from core.db.tables import Base, StoredFile
from core.db.workers import hold_singleton, release_singleton, renew_singleton
from core.errors import SetupError, StorageDamaged, StorageError
from core.settings import Settings
from core.storage import LocalStorage, Storage, make_storage
from core.version import VERSION
from workers.checkpoints import PREFIX as CHECKPOINT
from workers.garbage import BACKUP

FORMAT = 1
ROWS_AT_ONCE = 2000
HOLD_SECONDS = 120.0
RENEW_SECONDS = HOLD_SECONDS / 4
SAY_SECONDS = 5.0


def backup(
    context: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="Where the backup goes; one that is there is brought up to date.")],
) -> None:
    """Write all rows and files into a folder, while the service goes on working."""
    invocation = get_invocation(context)
    settings, output = invocation.settings, invocation.output
    with existing_database(settings) as database:
        facts = Backup(settings, database, make_storage(settings), output).write(folder.resolve())
    output.result(facts, f"{sum(facts['rows'].values())} rows and {facts['num_files']} files are in {folder}")


@dataclass
class Backup:
    """One backup while it is made."""

    settings: Settings
    database: Database
    storage: Storage
    output: Output
    _holder: str = field(default_factory=lambda: f"backup-{secrets.token_hex(8)}")
    _lapsed: bool = False

    def write(self, folder: Path) -> dict[str, Any]:
        """Returns what backup.json says. The sweep removes no file meanwhile: what the rows name stays until it is copied."""
        if folder.exists() and not folder.is_dir():
            raise SetupError(f"{folder} is a file; a backup is a folder, new, empty or an older backup")
        before = read_description(folder) if folder.exists() and any(folder.iterdir()) else None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        rows = folder / f"rows-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        with self._holding_the_sweep():
            counts, files = self._write_rows(rows)
            self._copy_files(files, LocalStorage(folder / "objects"))
        if self.settings.key_file.exists():
            write_private(folder / "admin.key", self.settings.key_file.read_text(encoding="utf-8"))
        facts = {
            "format": FORMAT,
            "software": VERSION,
            "schema": newest_revision(),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows_folder": rows.name,
            "rows": counts,
            "num_files": len(files),
        }
        # What backup.json speaks of is on the disk before it is.
        os.sync()
        write_private(folder / "backup.json", json.dumps(facts, indent=2) + "\n")
        if before is not None:
            shutil.rmtree(folder / before["rows_folder"], ignore_errors=True)
        return facts

    def _write_rows(self, folder: Path) -> tuple[dict[str, int], list[str]]:
        """(number of rows by table, digests of the files they name), all from one snapshot."""
        folder.mkdir(mode=0o700)
        counts: dict[str, int] = {}
        with self.database.reading() as session:
            if not self.database.is_sqlite:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            for table in Base.metadata.sorted_tables:
                query = sa.select(table).where(_kept(table))
                found = session.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}).mappings()
                with gzip.open(folder / f"{table.name}.jsonl.gz", "wt", encoding="utf-8", compresslevel=3) as file:
                    counts[table.name] = 0
                    for row in found:
                        file.write(json.dumps(dict(row), default=datetime.isoformat, ensure_ascii=False) + "\n")
                        counts[table.name] += 1
                self._check_hold()
            files = sa.select(StoredFile.digest).where(_kept(StoredFile.__table__)).distinct()
            return counts, sorted(session.scalars(files))

    def _copy_files(self, files: list[str], target: Storage) -> None:
        for digest in telling(files, self.output, "files copied"):
            self._check_hold()
            kept = target.put(self.storage.fetch(digest))
            if kept["digest"] != digest:
                target.remove(kept["digest"])
                raise StorageDamaged(f"the stored file {digest} was altered: its content has digest {kept['digest']}", digest=digest)

    @contextlib.contextmanager
    def _holding_the_sweep(self) -> Iterator[None]:
        """Held without a gap until the end of the block, or StorageError."""
        with self.database.transaction() as session:
            if not hold_singleton(session, BACKUP, holder=self._holder, seconds=HOLD_SECONDS):
                raise SetupError("another backup of this service is being made; wait for its end")
        ended = threading.Event()
        # A file may take longer to copy, and a table to write, than the hold lasts.
        keeper = threading.Thread(target=self._keep_holding, args=(ended,), name="hold-on-the-sweep", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            try:
                # Also after an error: a file may be missing because a sweep was let in.
                self._renew()
                self._check_hold()
            finally:
                with self.database.transaction() as session:
                    release_singleton(session, BACKUP, holder=self._holder)

    def _keep_holding(self, ended: threading.Event) -> None:
        while not self._lapsed and not ended.wait(RENEW_SECONDS):
            # The hold outlives a database that is away for a moment; when it does not, the next renewal says so.
            with contextlib.suppress(*AWAY):
                self._renew()

    def _renew(self) -> None:
        with self.database.transaction() as session:
            if not renew_singleton(session, BACKUP, holder=self._holder, seconds=HOLD_SECONDS):
                self._lapsed = True

    def _check_hold(self) -> None:
        if self._lapsed:
            raise StorageError(
                f"the backup's hold on the sweep was not renewed for {HOLD_SECONDS:g} s, so files that its rows name may be gone; "
                "run `noisy-student backup` again"
            )


def _kept(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Everything but checkpoints: an attempt replaces and removes them every minute, and goes on without."""
    return ~table.c.name.startswith(CHECKPOINT, autoescape=True) if table is StoredFile.__table__ else sa.true()


def telling(digests: list[str], output: Output, what: str) -> Iterator[str]:
    """Each one, and a line now and then."""
    told = time.monotonic()
    for number, digest in enumerate(digests):
        yield digest
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            output.say(f"  {number + 1} of {len(digests)} {what}")


def read_description(folder: Path) -> dict[str, Any]:
    """What backup.json says; SetupError when the folder is no backup that this version reads."""
    try:
        facts: dict[str, Any] = json.loads((folder / "backup.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{folder} is no complete backup: its backup.json cannot be read ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise SetupError(f"{folder} has a backup of format {found}, this version reads {FORMAT}")
    return facts
