"""Who asks, and may they: decided from the headers alone, before a byte of the body is read."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
import threading
import time
from contextlib import suppress
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
OUTAGE_SECONDS = 600.0
"""While the database is away, a key that was good this recently goes on opening /predict, which answers from memory: nobody can
revoke a key in a database that is away. Every other route reads rows and has nothing to answer with."""
SILENCE_SECONDS = 2.0
"""A database that says nothing for this long counts as away."""
ASK_AGAIN_SECONDS = 15.0
"""A question that is older hangs on a connection that will never answer; the next one takes another."""
READING = ("GET", "HEAD", "OPTIONS")

OPEN_PATHS = ("/", "/livez", "/readyz", "/metrics", "/openapi.json")
OPEN_PREFIXES = ("/docs", "/problems/")

SCOPES_OF_NOUN: dict[str, tuple[str, str]] = {
    "aliases": ("generations:read", "promote"),
    "api-keys": ("admin", "admin"),
    "batch-predictions": ("predict", "predict"),
    "dataset-versions": ("datasets:read", "datasets:write"),
    "datasets": ("datasets:read", "datasets:write"),
    "disk-use": ("runs:read", "admin"),
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
        self._asking: dict[bytes, tuple[float, asyncio.Task[Principal | None]]] = {}
        self._silent: set[asyncio.Task[Principal | None]] = set()

    async def find(self, secret: str, *, from_memory: bool = False) -> Principal | None:
        """The principal of a secret; None for one that opens nothing. `from_memory`: a database that is away is no obstacle."""
        # The digest is what is looked up: how long that takes tells nothing about the secret.
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._known.get(digest)
        age = math.inf if known is None else time.monotonic() - known[0]
        if known is not None and age < CACHE_SECONDS:
            return known[1]
        asking = self._ask(digest, secret)
        if known is None or not from_memory or age > OUTAGE_SECONDS:
            return await asyncio.shield(asking)
        if asking not in self._silent:
            await asyncio.wait({asking}, timeout=SILENCE_SECONDS)
        if not asking.done():
            # One question without an answer makes requests wait once, not each of them.
            self._silent.add(asking)
            return known[1]
        error = asking.exception()
        if error is not None and not isinstance(error, SQLAlchemyError):
            raise error
        return known[1] if error is not None else asking.result()

    def _ask(self, digest: bytes, secret: str) -> asyncio.Task[Principal | None]:
        """The question to the database; however many requests bring one secret at a time, it is asked once."""
        since, asking = self._asking.get(digest, (-math.inf, None))
        if asking is None or time.monotonic() - since > ASK_AGAIN_SECONDS:
            asking = asyncio.create_task(run_in_threadpool(self._read, secret))
            asking.add_done_callback(lambda done: self._remember(digest, done))
            self._asking[digest] = (time.monotonic(), asking)
        return asking

    def _remember(self, digest: bytes, asked: asyncio.Task[Principal | None]) -> None:
        self._silent.discard(asked)
        with self._lock:
            # Looked and kept in one: whoever revokes a key meanwhile is before this or after it.
            _, latest = self._asking.get(digest, (0.0, None))
            if latest is not asked:
                return
            del self._asking[digest]
            # At the end of the process the question is withdrawn.
            with suppress(asyncio.CancelledError):
                if asked.exception() is None:
                    self._keep(digest, asked.result())

    def _keep(self, digest: bytes, principal: Principal | None) -> None:
        if principal is None:
            self._known.pop(digest, None)
            return
        if len(self._known) >= CACHE_KEYS:
            self._known.clear()
        self._known[digest] = (time.monotonic(), principal)

    def _read(self, secret: str) -> Principal | None:
        with self._database.reading() as session:
            key = find_api_key(session, secret)
            return None if key is None else Principal(key.id, key.name, frozenset(key.scopes))

    def forget(self) -> None:
        """A key was revoked here; an answer that is on its way may be older than that."""
        with self._lock:
            self._known.clear()
            self._asking.clear()


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
        principal = await self.keys.find(_bearer(scope), from_memory=needed == "predict")
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
