"""Who needs which stored file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.tables import StoredFile


def name_files(session: Session, owner_id: str, files: dict[str, dict[str, Any]]) -> None:
    """Record that `owner_id` needs these files: name → {digest, num_bytes}. Naming the same ones again changes nothing."""
    present = {row.name for row in list_files(session, owner_id)}
    rows = [
        {"owner_id": owner_id, "name": name, "digest": facts["digest"], "num_bytes": facts["num_bytes"]}
        for name, facts in files.items()
        if name not in present
    ]
    if rows:
        session.execute(sa.insert(StoredFile), rows)


def list_files(session: Session, owner_id: str) -> list[StoredFile]:
    """The files of one owner by name."""
    return list(session.scalars(sa.select(StoredFile).where(StoredFile.owner_id == owner_id).order_by(StoredFile.name)))


def list_files_of(session: Session, owner_ids: Sequence[str]) -> dict[str, list[StoredFile]]:
    """The files of several owners by name, in one query."""
    found: dict[str, list[StoredFile]] = {owner_id: [] for owner_id in owner_ids}
    for row in session.scalars(sa.select(StoredFile).where(StoredFile.owner_id.in_(owner_ids)).order_by(StoredFile.name)):
        found[row.owner_id].append(row)
    return found


def forget_files(session: Session, owner_id: str, *, prefix: str = "") -> None:
    """The owner is gone, or needs its files of that prefix no more; housekeeping removes what nobody else names."""
    query = sa.delete(StoredFile).where(StoredFile.owner_id == owner_id)
    session.execute(query.where(StoredFile.name.startswith(prefix, autoescape=True)) if prefix else query)


def replace_files(session: Session, owner_id: str, files: dict[str, dict[str, Any]], *, prefix: str) -> dict[str, str]:
    """Name these files instead of the owner's whose names begin with `prefix`; returns name → digest of what nobody names now."""
    before = {row.name: row.digest for row in list_files(session, owner_id) if row.name.startswith(prefix)}
    forget_files(session, owner_id, prefix=prefix)
    name_files(session, owner_id, files)
    named = find_named_digests(session, list(before.values()))
    return {name: digest for name, digest in before.items() if digest not in named}


def find_named_digests(session: Session, digests: list[str]) -> set[str]:
    """Which of these digests some row names."""
    return set(session.scalars(sa.select(StoredFile.digest).where(StoredFile.digest.in_(digests))))
