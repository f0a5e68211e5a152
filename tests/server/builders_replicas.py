"""Predictor replicas as processes on PostgreSQL, beside an API: as a fleet runs them. Their role in the database may only read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg

from core.db.api_keys import create_api_key
from core.db.promotions import get_alias, move_alias
from tests.builders_services import create_database, free_port, postgresql_url, wait_until
from tests.server.builders_service import Service, running_service


@dataclass(frozen=True, slots=True)
class Replica:
    """One `python -m server --predictor`."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def ask(self, image: bytes, **parameters: Any) -> httpx.Response:
        return self.client.post("/predict", params=parameters, content=image)

    def readiness(self) -> tuple[int, dict[str, str]]:
        answer = self.client.get("/readyz")
        return answer.status_code, answer.json()["checks"]

    def metric(self, name: str) -> float:
        """Sum over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped by the kernel, as a suspended host is."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class Fleet:
    """An API that promotes, and what replicas need to run beside it."""

    service: Service
    socket: str
    database: str
    role: str
    key: str
    directory: Path
    replicas: list[Replica] = field(default_factory=list)

    @contextmanager
    def replica(self, **settings: str) -> Iterator[Replica]:
        """Start one more; it is ready."""
        port, log = free_port(), self.directory / f"replica-{uuid4().hex}.log"
        ours = {
            "DATABASE_URL": postgresql_url(self.socket, self.database).replace("postgres@", f"{self.role}@"),
            "DATA_DIRECTORY": str(self.service.services.settings.data_directory),
            "PORT": str(port),
        } | settings
        environment = dict(os.environ) | {f"NOISY_STUDENT_{name}": value for name, value in ours.items()}
        with log.open("wb") as errors:
            process = subprocess.Popen([sys.executable, "-m", "server", "--predictor"], env=environment, stderr=errors)
        headers = {"Authorization": f"Bearer {self.key}"}
        with process, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=30) as client:
            replica = Replica(process, client, log)
            try:
                wait_until(replica.is_ready, seconds=60, what="a replica's readiness")
                yield replica
            finally:
                process.kill()

    def promote(self, generation_id: str) -> None:
        """Through the API, whatever the alias is at."""
        found = self.service.get("/aliases/production")
        etag = found.headers["etag"] if found.status_code == 200 else None
        self.service.promote(generation_id, etag=etag).raise_for_status()

    def move_row(self, generation_id: str) -> None:
        """As an API with files of its own would have left it: nobody here has loaded that generation."""
        with self.service.services.database.transaction() as session:
            version = get_alias(session, "production").version
            move_alias(session, "production", generation_id, expected_version=version, action="promote", actor=None)

    @contextmanager
    def database_away(self) -> Iterator[None]:
        """Connections end, and new ones are refused."""
        try:
            self._administer(f'ALTER DATABASE "{self.database}" ALLOW_CONNECTIONS false')
            self._administer(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self.database}'")
            yield
        finally:
            self._administer(f'ALTER DATABASE "{self.database}" ALLOW_CONNECTIONS true')

    @contextmanager
    def database_silent(self) -> Iterator[None]:
        """Connections stay open, and nothing is answered on them."""
        server = int((Path(self.socket) / "data/postmaster.pid").read_text().split()[0])
        children = [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
        try:
            for pid in (server, *children):
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in (*children, server):
                os.kill(pid, signal.SIGCONT)

    def _administer(self, statement: str) -> None:
        with psycopg.connect(host=self.socket, user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def running_fleet(directory: Path, socket: str) -> Iterator[Fleet]:
    """The API on a migrated database of its own; no replica yet."""
    name, role = f"fleet_{uuid4().hex}", f"reader_{uuid4().hex}"
    url = create_database(socket, name, template="migrated")
    with psycopg.connect(host=socket, user="postgres", dbname=name, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
    with running_service(directory, database_url=url) as service:
        with service.services.database.transaction() as session:
            _, key = create_api_key(session, name="replicas", scopes=["predict"])
        yield Fleet(service, socket, name, role, key, directory)


class Callers:
    """Threads that ask again and again until they are told to stop."""

    def __init__(self, num_threads: int, replicas: list[Replica], image: bytes, *, pause_seconds: float = 0.0) -> None:
        self.answers: list[tuple[int, Any, float]] = []
        """(status, body, seconds)."""
        self._pause_seconds = pause_seconds
        self._stop = threading.Event()
        addresses = [replicas[number % len(replicas)].client for number in range(num_threads)]
        self._threads = [threading.Thread(target=self._ask, args=(client.base_url, client.headers, image)) for client in addresses]

    def _ask(self, url: httpx.URL, headers: httpx.Headers, image: bytes) -> None:
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
            while not self._stop.wait(self._pause_seconds):
                started = time.monotonic()
                answer = client.post("/predict", content=image)
                self.answers.append((answer.status_code, answer.json(), time.monotonic() - started))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def passed(seconds: float) -> Callable[[], bool]:
    """A condition that comes true by itself."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
