"""How much and how slowly a client may send, counted while the bytes come in."""

from __future__ import annotations

import asyncio
from collections import Counter

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import InvalidRequest, PayloadTooLarge, TooManyInFlight
from core.settings import Settings
from server.errors import to_problem

CHUNK_SECONDS = 30.0
"""A body whose next piece takes longer than this is given up on."""


class BodyLimits:
    """ASGI middleware: 413 by Content-Length before a byte is read, and again by counting what streams in; 408 when nothing comes."""

    def __init__(self, app: ASGIApp, *, settings: Settings, chunk_seconds: float = CHUNK_SECONDS) -> None:
        self.app = app
        self.settings = settings
        self.chunk_seconds = chunk_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.settings.predict_max_bytes if scope["path"].startswith("/predict") else self.settings.body_max_bytes
        try:
            _check_declared(scope, limit)
        except (PayloadTooLarge, InvalidRequest) as error:
            problem = to_problem(error)
            problem.headers["Connection"] = "close"
            await problem.to_response(scope)(scope, receive, send)
            return
        await self.app(scope, _counted(receive, limit, self.chunk_seconds), send)


class InFlight:
    """ASGI middleware: 429 before a byte is read when a key has `most` requests to /predict open already; 0 counts nothing."""

    def __init__(self, app: ASGIApp, *, most: int) -> None:
        self.app = app
        self.most = most
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.most == 0 or scope["type"] != "http" or not scope["path"].startswith("/predict"):
            await self.app(scope, receive, send)
            return
        key = scope["state"]["principal"].key_id
        if self._open[key] >= self.most:
            refusal = TooManyInFlight(
                f"this key has {self.most} requests to /predict open, which is as many as it may", retry_after_seconds=1
            )
            problem = to_problem(refusal)
            problem.headers["Connection"] = "close"
            await problem.to_response(scope)(scope, receive, send)
            return
        self._open[key] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]


def _check_declared(scope: Scope, limit: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise InvalidRequest("Content-Length must be a number")
            if int(value) > limit:
                raise PayloadTooLarge(f"the body has {int(value)} bytes; this route takes {limit}", limit_bytes=limit)


def _counted(receive: Receive, limit: int, chunk_seconds: float) -> Receive:
    read = 0
    complete = False

    async def counted() -> Message:
        nonlocal read, complete
        if complete:
            # Waiting for the client to go away may take as long as it likes.
            return await receive()
        try:
            async with asyncio.timeout(chunk_seconds):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not go on for {chunk_seconds:g} seconds", {"Connection": "close"}) from None
        read += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if read > limit:
            # An HTTPException, because FastAPI's body reader lets only that one through.
            raise HTTPException(413, f"the body has more than the {limit} bytes that this route takes", {"Connection": "close"})
        return message

    return counted
