"""The outermost frame of every request: its id, its metrics, and the last resort when something unexpected happens."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.ids import new_id
from server.errors import log_problem, to_problem
from server.metrics import Metrics

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")


class RequestFrame:
    """ASGI middleware around everything; one of the three places in the project that may catch every exception."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id("request")
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, framed)
        except Exception as error:
            # The last resort: nothing leaves without a problem+json and a log line.
            problem = to_problem(error)
            log_problem(problem, error, scope)
            if status == 0:
                await problem.to_response(scope)(scope, receive, framed)
        finally:
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            # A made-up method is no label of its own: a client could make as many as it likes.
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.observe(method=method, route=route, status=status, seconds=time.perf_counter() - started)
