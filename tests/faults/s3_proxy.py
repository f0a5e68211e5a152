"""An HTTP address in front of a store that speaks like S3, which refuses, breaks off, dawdles, falls silent or alters what passes."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Trouble = Literal["refused", "reset", "cut", "slow", "silent", "altered"]
REFUSALS = ((503, "SlowDown"), (503, "ServiceUnavailable"), (500, "InternalError"))
SLOW_SECONDS = 0.4
_NOT_PASSED_ON = {"connection", "expect", "keep-alive", "transfer-encoding"}


class S3Proxy:
    """Passes requests on, until told otherwise."""

    def __init__(self, port: int, *, seed: int = 0) -> None:
        """`port` is the store's, on loopback."""
        self.behind = port
        self.trouble: Trouble | None = None
        self.share = 1.0
        """Of the requests that meet the trouble; what is altered, is so once for each address, as on a bad line."""
        self._chance = random.Random(f"{seed} s3")
        self._altered: set[str] = set()
        self._lock = threading.Lock()
        self._spoken = threading.Event()
        self._counts: dict[str, int] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # connections that break are what this is for
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, name="s3-proxy", daemon=True).start()

    def begin(self, trouble: Trouble, *, share: float = 1.0) -> None:
        """From now on."""
        self._spoken.clear()
        self._altered.clear()
        self.trouble, self.share = trouble, share

    def end(self) -> None:
        """Who waits for an answer in a silence gets a reset."""
        self.trouble = None
        self._spoken.set()

    def count(self, trouble: Trouble) -> int:
        """Requests that met it so far."""
        return self._counts.get(trouble, 0)

    def close(self) -> None:
        self.end()
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str, path: str) -> Trouble | None:
        """What this request meets."""
        trouble = self.trouble
        object_asked = method == "GET" and "/objects/" in path
        if trouble is None or (trouble in ("cut", "altered") and not object_asked):
            return None
        with self._lock:
            if trouble == "altered":
                if path in self._altered:
                    return None
                self._altered.add(path)
            elif self._chance.random() >= self.share:
                return None
            self._counts[trouble] = self._counts.get(trouble, 0) + 1
        return trouble

    def refusal(self) -> tuple[int, str]:
        with self._lock:
            return self._chance.choice(REFUSALS)

    def alter(self, content: bytes) -> bytes:
        """One bit."""
        with self._lock:
            place, bit = self._chance.randrange(len(content)), self._chance.randrange(8)
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]

    def wait_in_silence(self) -> None:
        self._spoken.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: S3Proxy

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        trouble = self.proxy.draw(self.command, self.path)
        if trouble == "refused":
            self._refuse()
        elif trouble in ("reset", "silent"):
            if trouble == "silent":
                self.proxy.wait_in_silence()
            self._break_off()
        else:
            if trouble == "slow":
                time.sleep(SLOW_SECONDS)
            self._pass_on(body, trouble)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _refuse(self) -> None:
        status, code = self.proxy.refusal()
        content = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self._send(content, len(content))

    def _pass_on(self, body: bytes, trouble: Trouble | None) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
        behind = http.client.HTTPConnection("127.0.0.1", self.proxy.behind, timeout=60)
        try:
            # The name that was signed stays: the store sees the request as its client wrote it.
            behind.request(self.command, self.path, body or None, headers)
            answer = behind.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self._break_off()
            return
        finally:
            behind.close()
        if trouble == "altered" and content and answer.status in (200, 206):
            content = self.proxy.alter(content)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _NOT_PASSED_ON | {"content-length"}:
                self.send_header(name, value)
        told = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(content)
        self._send(content[: len(content) // 2] if trouble == "cut" else content, told)
        if trouble == "cut":
            self._break_off()

    def _send(self, content: bytes, length: int) -> None:
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def _break_off(self) -> None:
        """As a network does: a reset, and no more."""
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Both files of the connection hold it open otherwise.
        for end in (self.rfile, self.wfile, self.connection):
            with suppress(OSError):
                end.close()


def troubled(proxy: S3Proxy, trouble: Trouble, wait: Callable[[], object], *, share: float = 1.0) -> int:
    """The trouble for as long as `wait` takes; how many requests met it."""
    before = proxy.count(trouble)
    proxy.begin(trouble, share=share)
    try:
        wait()
    finally:
        proxy.end()
    return proxy.count(trouble) - before
