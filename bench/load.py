"""A closed-loop load generator for machines without wrk: one process, one thread and raw socket a connection, bodies encoded before.

    python -m bench.load PORT PATH KEY FOLDER CONNECTIONS SECONDS

Prints JSON: requests, errors, seconds, p50_ms, p99_ms, cpu_seconds.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path

_END = b"\r\n\r\n"


def encode(path: str, key: str, body: bytes) -> bytes:
    """A whole request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class _Caller(threading.Thread):
    def __init__(self, port: int, requests: list[bytes], first: int, until: float) -> None:
        super().__init__()
        self.requests, self.first, self.until = requests, first, until
        self.connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.errors = 0
        self.seconds: list[float] = []

    def run(self) -> None:
        place = self.first
        while time.perf_counter() < self.until:
            sent = time.perf_counter()
            self.connection.sendall(self.requests[place % len(self.requests)])
            place += 1
            self.errors += not self._answer().startswith(b"HTTP/1.1 200")
            self.seconds.append(time.perf_counter() - sent)
        self.connection.close()

    def _answer(self) -> bytes:
        received = b""
        while _END not in received:
            received += self._some()
        head, _, body = received.partition(_END)
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        left = int(lines[b"content-length"]) - len(body)
        while left > 0:
            left -= len(self._some())
        return head

    def _some(self) -> bytes:
        found = self.connection.recv(65536)
        if not found:
            raise ConnectionError("the server hung up")
        return found


def main() -> None:
    port, path, key, folder, connections, seconds = sys.argv[1:]
    requests = [encode(path, key, file.read_bytes()) for file in sorted(Path(folder).rglob("*.jpg"))]
    started = time.perf_counter()
    until = started + float(seconds)
    callers = [_Caller(int(port), requests, number * len(requests) // int(connections), until) for number in range(int(connections))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    elapsed = time.perf_counter() - started
    times = sorted(seconds for caller in callers for seconds in caller.seconds)
    found = {
        "requests": len(times),
        "errors": sum(caller.errors for caller in callers),
        "seconds": elapsed,
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[99 * len(times) // 100],
        "cpu_seconds": time.process_time(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
