"""API keys: a 256-bit secret shown once, its SHA-256 kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core import lifecycle
from core.db.session import now
from core.db.tables import ApiKey, Secret
from core.errors import InvalidRequest
from core.ids import absent, new_id

PREFIX = "nss_"


def create_api_key(session: Session, *, name: str, scopes: list[str]) -> tuple[ApiKey, str]:
    """Insert a key; the second value is its secret, which exists nowhere else."""
    unknown = sorted(set(scopes) - set(lifecycle.SCOPES))
    if unknown or not scopes:
        raise InvalidRequest(f"scopes {unknown or scopes} are not known; choose from {', '.join(lifecycle.SCOPES)}", pointer="/scopes")
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(id=new_id("api_key"), name=name, secret_digest=_digest(secret), scopes=sorted(set(scopes)), created_at=now(session))
    session.add(key)
    session.flush()
    return key, secret


def find_api_key(session: Session, secret: str) -> ApiKey | None:
    """The live key of this secret, or None. The digest is looked up, then compared in constant time."""
    digest = _digest(secret)
    key = session.scalar(sa.select(ApiKey).where(ApiKey.secret_digest == digest, ApiKey.revoked_at.is_(None)))
    return key if key is not None and hmac.compare_digest(key.secret_digest, digest) else None


def revoke_api_key(session: Session, key_id: str) -> ApiKey:
    """The key stops working at once; revoking twice changes nothing."""
    key = session.get(ApiKey, key_id)
    if key is None:
        raise absent("API key", key_id)
    key.revoked_at = key.revoked_at or now(session)
    return key


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def get_shared_secret(session: Session, name: str) -> bytes:
    """A random 256-bit key that all replicas share, made at its first use."""
    row = session.get(Secret, name)
    if row is None:
        row = Secret(name=name, value=secrets.token_hex(32))
        session.add(row)
        session.flush()
    return bytes.fromhex(row.value)
