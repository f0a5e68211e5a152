"""One key, one effect: the answer to a repeated request is the answer to the first."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.session import now
from core.db.tables import IdempotencyRecord
from core.errors import IdempotencyMismatch


def find_answer(session: Session, *, key: str, api_key_id: str, fingerprint: str) -> IdempotencyRecord | None:
    """The stored answer, None at the first use; IdempotencyMismatch when the key came with another request before.

    `fingerprint` is a digest of method, path and body.
    """
    if session.get_bind().dialect.name == "postgresql":
        # Two requests with one key at the same moment take turns, as every writer does on SQLite.
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"{api_key_id} {key}", 0))))
    record = session.get(IdempotencyRecord, (key, api_key_id))
    if record is not None and record.fingerprint != fingerprint:
        raise IdempotencyMismatch(f"Idempotency-Key {key!r} was used before for another request; take a new key")
    return record


def remember_answer(
    session: Session, *, key: str, api_key_id: str, fingerprint: str, status_code: int, body: dict[str, Any], location: str | None
) -> None:
    """Keep the answer, in the transaction that makes it true."""
    record = IdempotencyRecord(
        key=key,
        api_key_id=api_key_id,
        fingerprint=fingerprint,
        status_code=status_code,
        body=body,
        location=location,
        created_at=now(session),
    )
    session.add(record)
    session.flush()
