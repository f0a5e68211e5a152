"""`python -m server` as a process: small, without torch, clear about what is in its way, and gone when told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from core.db.schema import migrate
from core.db.session import Database
from core.settings import Settings
from server.__main__ import open_socket
from tests.server.builders import add_job, wait_until

LOADED = """
import sys, time
started = time.process_time()
import server.app
print(round(time.process_time() - started, 2), *sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(directory: Path, port: int) -> dict[str, str]:
    ours = {"DATA_DIRECTORY": str(directory), "PORT": str(port), "REQUIRE_KEYS": "false"}
    return dict(os.environ) | {f"NOISY_STUDENT_{name}": value for name, value in ours.items()}


@contextmanager
def running(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    migrate(Database(Settings(data_directory=directory).resolved_database_url))
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "server"], env=environment(directory, port), stderr=subprocess.PIPE)
    with process, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        try:
            wait_until(lambda: answers(client), seconds=60)
            yield process, client
        finally:
            process.kill()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_the_app_is_imported_without_anything_heavy() -> None:
    heavy = ["torch", "timm", "torchvision", "pyarrow", "onnxruntime", "alembic", "celery", "redis"]

    answer = subprocess.run([sys.executable, "-c", LOADED, *heavy], check=True, capture_output=True, text=True)

    seconds, *loaded = answer.stdout.split()
    assert loaded == []
    # Processor time, so that a busy machine does not fail this; the goal is 2 seconds on a quiet one.
    assert float(seconds) < 4


def test_a_started_server_is_small_and_has_no_torch(tmp_path: Path) -> None:
    with running(tmp_path) as (process, client):
        for path in ("/readyz", "/openapi.json", "/metrics", "/api/v1/jobs", "/api/v1/runs", "/api/v1/recipes", "/docs"):
            assert client.get(path).status_code == 200
        status = Path(f"/proc/{process.pid}/status").read_text()
        mapped = Path(f"/proc/{process.pid}/maps").read_text()

    resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024
    assert resident <= 150
    assert "torch" not in mapped


def test_answers_leave_without_waiting_for_the_acknowledgement_of_their_first_half() -> None:
    """Else each takes 40 ms more on Linux, whose clients acknowledge late."""
    told: list[bool] = []

    def look(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        told.append(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        writer.close()

    async def connect() -> None:
        listener = open_socket("127.0.0.1", 0)
        async with await asyncio.start_server(look, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(connect())

    assert told == [True]


def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        answer = subprocess.run(
            [sys.executable, "-m", "server"], env=environment(tmp_path, port), capture_output=True, text=True, timeout=60, check=False
        )

    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in answer.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_soon_although_a_stream_is_open(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as (process, client):
        job = add_job(Database(Settings(data_directory=tmp_path).resolved_database_url))
        with client.stream("GET", f"/api/v1/jobs/{job.id}/events", headers={"Accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("id: 1"):
                pass
            started = time.monotonic()
            process.send_signal(number)
            rest = list(lines)

        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 8
        assert not any("end" in line for line in rest)
