"""PostgreSQL and Redis that can be stopped and started again over the same data."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg
import redis

from tests.builders_services import (
    die_with_tests,
    find_postgresql,
    free_port,
    postgresql_answers,
    redis_answers,
    running_as,
    unprivileged_user,
    wait_until,
)

START_SECONDS = 30.0
COUNT_CLIENTS = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'rows'"
END_CLIENTS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = 'rows' AND pid <> pg_backend_pid()"


class Postgresql:
    """A server of its own on a Unix socket; its database is called `rows`."""

    def __init__(self) -> None:
        # Sockets have short names.
        self.directory = Path(tempfile.mkdtemp(prefix="nss-pg-", dir="/tmp"))
        self._user = unprivileged_user()
        if self._user is not None:
            shutil.chown(self.directory, self._user)
        initdb = [find_postgresql("initdb"), "-D", str(self._data), "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale"]
        subprocess.run([*initdb, "-E", "UTF8"], check=True, capture_output=True, cwd=self.directory, **running_as(self._user))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        with self.connect("postgres") as connection:
            connection.execute('CREATE DATABASE "rows"')
        self.url = f"postgresql://postgres@/rows?host={self.directory}"
        self.socket = str(self.directory / ".s.PGSQL.5432")

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def start(self) -> None:
        """Returns when it answers."""
        command = [find_postgresql("postgres"), "-D", str(self._data), "-k", str(self.directory), "-c", "listen_addresses="]
        command += ["-c", "fsync=off", "-c", "max_connections=200", "-c", "shared_buffers=32MB"]
        with (self.directory / "log").open("ab") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": self.directory, "preexec_fn": die_with_tests}
            process = subprocess.Popen(command, **options, **running_as(self._user))
        self._process = process
        wait_until(lambda: postgresql_answers(self.directory, process), seconds=START_SECONDS, what="PostgreSQL's start")

    def stop(self) -> None:
        """At once, as after a crash: what was committed is in its log."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def connect(self, name: str = "rows") -> psycopg.Connection[Any]:
        """Past every proxy."""
        return psycopg.connect(host=str(self.directory), user="postgres", dbname=name, autocommit=True)

    def end_connections(self) -> int:
        """pg_terminate_backend for everybody; how many there were."""
        with self.connect() as connection:
            row = connection.execute(END_CLIENTS).fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


class Redis:
    """A server of its own on loopback, with an append-only file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        program = shutil.which("redis-server")
        assert program is not None, "redis-server is missing: install the package `redis-server`"
        command = [
            program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.directory),
            "--save",
            "",
            "--appendonly",
            "yes",
        ]
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_tests)  # noqa: PLW1509
        wait_until(lambda: redis_answers(self.url), seconds=START_SECONDS, what="Redis's start")

    def stop(self) -> None:
        """As after a power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def connect(self) -> redis.Redis:
        """Past every proxy."""
        return redis.Redis.from_url(self.url)

    def close(self) -> None:
        self.stop()
