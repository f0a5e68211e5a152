"""Who asks, and may they: decided from the headers alone, before a byte of the body is read."""

from __future__ import annotations

import hashlib
import ipaddress
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from core import lifecycle
from core.db.api_keys import find_api_key
from core.db.session import Database
from core.errors import Forbidden, ServiceError, Unauthenticated
from server.errors import log_problem, to_problem

CACHE_SECONDS = 5.0
"""A revoked key may go on working for this long on another replica; on the one that revoked it, it stops at once."""
CACHE_KEYS = 1024
READING = ("GET", "HEAD", "OPTIONS")

OPEN_PATHS = ("/", "/livez", "/readyz", "/metrics", "/openapi.json")
OPEN_PREFIXES = ("/docs", "/problems/")

SCOPES_OF_NOUN: dict[str, tuple[str, str]] = {
    "aliases": ("generations:read", "promote"),
    "api-keys": ("admin", "admin"),
    "batch-predictions": ("predict", "predict"),
    "dataset-versions": ("datasets:read", "datasets:write"),
    "datasets": ("datasets:read", "datasets:write"),
    "generations": ("generations:read", "generations:write"),
    "jobs": ("jobs:read", "jobs:write"),
    "pseudo-label-sets": ("runs:read", "runs:write"),
    "queues": ("jobs:read", "admin"),
    "recipes": ("runs:read", "runs:write"),
    "runs": ("runs:read", "runs:write"),
    "workers": ("jobs:read", "admin"),
}
"""Noun below /api/v1 → the scope for reading and the one for everything else. `admin` may do all of it."""


def needed_scope(method: str, path: str) -> str | None:
    """The scope a request needs; `""` when any key will do (to be told that there is no such route), None when no key is needed."""
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
        return None
    parts = path.strip("/").split("/")
    if parts[0] == "predict":
        return "predict"
    if parts[:2] == ["api", "v1"] and len(parts) > 2 and parts[2] in SCOPES_OF_NOUN:
        reading, writing = SCOPES_OF_NOUN[parts[2]]
        return reading if method in READING else writing
    return ""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks."""

    key_id: str
    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key holds the scope."""
        return scope == "" or scope in self.scopes or "admin" in self.scopes


ANYBODY = Principal("anonymous", "anonymous", frozenset(lifecycle.SCOPES))
"""Who asks when keys are switched off."""


class KeyRing:
    """Live keys by the digest of their secret, remembered for a few seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[bytes, tuple[float, Principal]] = {}
        self._lock = threading.Lock()

    async def find(self, secret: str) -> Principal | None:
        """The principal of a secret; None for one that opens nothing."""
        # The digest is what is looked up: how long that takes tells nothing about the secret.
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._known.get(digest)
        if known is not None and known[0] > time.monotonic():
            return known[1]
        principal = await run_in_threadpool(self._read, secret)
        if principal is not None:
            with self._lock:
                if len(self._known) >= CACHE_KEYS:
                    self._known.clear()
                self._known[digest] = (time.monotonic() + CACHE_SECONDS, principal)
        return principal

    def _read(self, secret: str) -> Principal | None:
        with self._database.reading() as session:
            key = find_api_key(session, secret)
            return None if key is None else Principal(key.id, key.name, frozenset(key.scopes))

    def forget(self) -> None:
        """A key was revoked here."""
        with self._lock:
            self._known.clear()


class Authentication:
    """ASGI middleware: 401 without a known key, 403 without the scope; else `state.principal` says who asks."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, required: bool) -> None:
        self.app = app
        self.keys = keys
        self.required = required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope["state"]["principal"] = await self._admit(scope)
        except (ServiceError, SQLAlchemyError) as error:
            problem = to_problem(error)
            log_problem(problem, error, scope)
            # The body was not read, so the connection cannot be used again.
            problem.headers["Connection"] = "close"
            await problem.to_response(scope)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Principal | None:
        needed = needed_scope(scope["method"], scope["path"])
        if needed is None:
            return None
        if not self.required:
            _refuse_other_sites(scope)
            return ANYBODY
        principal = await self.keys.find(_bearer(scope))
        if principal is None:
            raise Unauthenticated("this API key is not known, or was revoked")
        if not principal.may(needed):
            raise Forbidden(f"API key {principal.name!r} lacks the scope {needed}", scope=needed)
        return principal


def _refuse_other_sites(scope: Scope) -> None:
    """Without keys, a page of another site in a browser on this machine must not be able to send anything here."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get(b"host", "localhost")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise Forbidden(f"keys are off, and then the address must be one of this machine, not {host[:200]!r}")
    origin = headers.get(b"origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise Forbidden(f"keys are off, and then pages of other sites ({origin[:200]}) may not ask anything")


def is_loopback(host: str) -> bool:
    """Whether only this machine can mean that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bearer(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, secret = value.decode("latin-1").partition(" ")
            if kind.lower() == "bearer" and secret.strip():
                return str(secret.strip())
    raise Unauthenticated("an API key is needed: send the header 'Authorization: Bearer nss_…'")
