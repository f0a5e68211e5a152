"""What nobody needs any more, and taking it away: one function for housekeeping and for `noisy-student gc`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from core.db.files import find_named_digests
from core.db.retention import Expired, expire, find_expired
from core.db.session import Database, now
from core.db.workers import is_held
from core.logs import get_log
from core.settings import Settings
from core.storage import Storage

BACKUP = "backup"
"""Held while a backup is made: no stored file is removed then."""
_BATCH = 200


@dataclass(frozen=True, slots=True)
class Collected:
    """What went, or would go."""

    expired: list[Expired]
    num_removed: int
    """Stored files that no row named and that were old enough."""
    held_by_backup: bool
    """A backup is being made, so stored files stay for now."""

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        expired = [one.to_dict() for one in self.expired]
        return {"expired": expired, "num_removed_files": self.num_removed, "held_by_backup": self.held_by_backup}


def collect(database: Database, storage: Storage, settings: Settings, *, dry_run: bool = False) -> Collected:
    """Forget what is old by the settings, then remove the files that no row names. `dry_run` only says what would go."""
    expired = forget_expired(database, settings, dry_run=dry_run)
    num_removed, held = sweep_files(database, storage, settings, dry_run=dry_run)
    return Collected(expired, num_removed, held)


def forget_expired(database: Database, settings: Settings, *, dry_run: bool = False, at_once: bool = True) -> list[Expired]:
    """Take what is old by the settings out of the rows; writes nothing while there is nothing.

    `at_once` off takes a bite and leaves the rest for the next time.
    """
    with database.reading() as session:
        found = find_expired(session, settings)
    if dry_run or not found:
        return found
    taken: dict[str, Expired] = {}
    while True:
        with database.transaction() as session:
            bite, is_more = expire(session, settings)
        for one in bite:
            get_log().info("retention.expired", what=one.what, num=one.num, freed_bytes=one.freed_bytes, days=one.days)
            taken[one.what] = one.plus(taken.get(one.what))
        if not (at_once and is_more):
            return list(taken.values())


def sweep_files(database: Database, storage: Storage, settings: Settings, *, dry_run: bool = False) -> tuple[int, bool]:
    """Remove stored files that no row names and that are old enough not to be about to be named.

    Returns how many, and whether a backup held the sweep.
    """
    grace = settings.orphan_grace_seconds
    num_removed = 0
    with database.reading() as session:
        # By the clock of all: a host whose own is an hour ahead would take for old what is about to be named.
        moment = now(session).timestamp()
        held = is_held(session, BACKUP)
    if held and not dry_run:
        return 0, True
    for digests in in_batches(storage.list_old(older_than_seconds=grace, now_seconds=moment)):
        with database.reading() as session:
            if not dry_run and is_held(session, BACKUP):
                return num_removed, True
            named = find_named_digests(session, digests)
        for digest in set(digests) - named:
            num_removed += 1
            if not dry_run:
                storage.remove(digest, unless_touched_within_seconds=grace)
                get_log().info("storage.removed", digest=digest)
    return num_removed, held


def in_batches(items: Iterable[str], size: int = _BATCH) -> Iterator[list[str]]:
    """As many at a time as one query takes well."""
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
