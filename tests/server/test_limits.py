"""What a client may not do to the service with bytes and patience, through a real socket."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import __main__ as process
from server.protocol import GuardedProtocol
from tests.server.builders import Api, api_on_a_socket

HIGHEST_READ = 64 * 1024


def connect(api: Api) -> socket.socket:
    url = httpx.URL(api.client.base_url)
    return socket.create_connection((url.host, url.port or 80), timeout=20)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    text = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            text += piece
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def list_files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if not path.name.startswith("noisy-student.sqlite3")}


@pytest.mark.parametrize("path", ["/predict", "/predict/images", "/api/v1/datasets"])
def test_fifty_megabytes_without_a_key_are_refused_unread(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    receive = GuardedProtocol.data_received

    def count(self: GuardedProtocol, data: bytes) -> None:
        nonlocal read
        read += len(data)
        receive(self, data)

    monkeypatch.setattr(GuardedProtocol, "data_received", count)
    with api_on_a_socket(tmp_path, require_keys=True) as api:
        before = list_files(tmp_path)
        with connect(api) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n".encode())
            status, body = read_answer(connection)
            with contextlib.suppress(OSError):
                for _ in range(50):
                    connection.sendall(b"x" * 1_000_000)

        assert (status, body["code"]) == (401, "unauthenticated")
        assert read <= HIGHEST_READ
        assert list_files(tmp_path) == before


def test_a_client_that_sends_everything_first_reads_its_401(tmp_path: Path) -> None:
    with api_on_a_socket(tmp_path, require_keys=True) as api:
        answer = api.client.post("/predict", content=b"x" * 50_000_000)

        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


def test_a_body_that_is_declared_too_large_is_refused_unread(tmp_path: Path) -> None:
    with api_on_a_socket(tmp_path) as api, connect(api) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000000\r\n\r\n")

        assert read_answer(connection)[1]["code"] == "payload_too_large"


@pytest.mark.parametrize("path", ["/predict/images", "/predict/json", "/api/v1/datasets"])
def test_a_body_of_undeclared_length_is_counted(tmp_path: Path, path: str) -> None:
    kind = "multipart/form-data; boundary=x" if path == "/predict/images" else "application/json"
    with api_on_a_socket(tmp_path, predict_max_bytes=100_000, body_max_bytes=100_000) as api:
        answer = api.client.post(path, content=(b"\n" * 10_000 for _ in range(11)), headers={"Content-Type": kind})

        assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
        assert answer.headers["content-type"] == "application/problem+json"


def test_headers_that_trickle_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "header_seconds", 0.5)
    with api_on_a_socket(tmp_path) as api, connect(api) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        started = time.monotonic()

        status, body = read_answer(connection)

        assert (status, body["code"]) == (408, "request_timeout")
        assert time.monotonic() - started < 10


def test_headers_that_trickle_after_an_answer_are_cut_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "header_seconds", 0.5)
    with api_on_a_socket(tmp_path) as api, connect(api) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /livez HTTP/1.1\r\n")

        assert read_answer(connection)[0] == 408


def test_a_slow_answer_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "header_seconds", 0.3)
    with api_on_a_socket(tmp_path) as api:
        api.app.add_api_route("/livez/slow", lambda: time.sleep(1))

        assert api.client.get("/livez/slow").status_code == 200


def test_what_is_no_http_is_told_so_as_a_problem(tmp_path: Path) -> None:
    with api_on_a_socket(tmp_path) as api, connect(api) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")

        assert read_answer(connection)[1]["code"] == "bad_request"


def test_more_connections_than_the_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_CONNECTIONS", 3)
    with api_on_a_socket(tmp_path) as api, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(api))
        with connect(api) as one_too_many:
            assert read_answer(one_too_many)[1]["code"] == "unavailable"
        stack.close()

        assert api.client.get("/livez").status_code == 200
