"""The connection itself: a deadline for headers, a cap on connections, and problem+json for what never becomes a request.

uvicorn 0.54 has no header deadline (a client that sends one byte a minute keeps its connection) and answers in plain text.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

HEADER_SECONDS = 15.0


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 on one connection."""

    header_seconds = HEADER_SECONDS

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # The cap is held here, where it is answered with a problem.
        self.max_connections = self.limit_concurrency
        self.limit_concurrency = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock; refuse at once what exceeds the cap."""
        super().connection_made(transport)
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._refuse(503, "unavailable", f"more than {self.max_connections} connections are open; come back later")
            return
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._forget_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Let uvicorn read, then see whether headers are still missing."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self._watch_headers()
        else:
            self._forget_deadline()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP request is told so as a problem."""
        self._refuse(400, "bad_request", msg)

    def _watch_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._headers_too_slow)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _headers_too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(408, "request_timeout", f"the headers did not come within {self.header_seconds:g} seconds")

    def _refuse(self, status: int, code: str, detail: str) -> None:
        phrase = HTTPStatus(status).phrase
        body = {"type": f"/problems/{code}", "title": phrase, "status": status, "detail": detail, "code": code, "request_id": None}
        text = json.dumps(body).encode()
        headers = [("content-type", "application/problem+json"), ("content-length", str(len(text))), ("connection", "close")]
        response = h11.Response(status_code=status, headers=headers, reason=phrase)
        for event in (response, h11.Data(data=text), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
