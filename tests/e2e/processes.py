"""Real processes on loopback: the embedded service, or the fleet's commands with PostgreSQL, Redis and Celery workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from core.db.api_keys import create_api_key
from core.db.schema import migrate
from core.db.session import Database
from core.lifecycle import SCOPES

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """Poll until the condition is true; AssertionError names what did not happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen within {seconds} s")


Place = Path | str | dict[str, Any]
"""Of the images of a dataset."""


class Processes:
    """Named child processes of a test, each with a log; whatever still runs is killed at the end, by its process id."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.running[name] = process
        return process

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def terminate(self, name: str, *, seconds: float = 60) -> int:
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def stop_all(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


class Service:
    """A running service and a client that holds an admin key."""

    def __init__(self, processes: Processes, *, port: int, data_directory: Path) -> None:
        self.processes = processes
        self.url = f"http://127.0.0.1:{port}"
        self.data_directory = data_directory
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        """Stop its processes and hang up."""
        self.client.close()
        self.processes.stop_all()

    def wait_ready(self, *, seconds: float = 120) -> None:
        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/readyz").status_code == 200
            return False

        wait_until(ready, seconds=seconds, what=f"{self.url}/readyz")

    def use_key(self, secret: str) -> None:
        self.client.headers["Authorization"] = f"Bearer {secret}"

    def get(self, path: str, **params: Any) -> Any:
        response = self.client.get(path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, body: Any = None, *, status: int = 202, headers: dict[str, str] | None = None) -> Any:
        response = self.client.post(path, json={} if body is None else body, headers=headers)
        assert response.status_code == status, f"{response.status_code} {response.text}"
        return response.json()

    def finished_job(self, job_id: str, *, seconds: float = 120) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            job: dict[str, Any] = self.client.get(f"/api/v1/jobs/{job_id}", headers={"Prefer": "wait=10"}).json()
            return job if job["status"] in ("succeeded", "failed", "canceled") else None

        job: dict[str, Any] = wait_until(ended, seconds=seconds, what=f"the end of job {job_id}")
        return job

    def verify(self) -> None:
        """`noisy-student doctor --verify` finds nothing."""
        command = [str(BIN / "noisy-student"), "doctor", "--verify"]
        found = subprocess.run(command, env=self.processes.environment, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 0, found.stdout + found.stderr

    def register(self, name: str, kind: str, place: Place) -> str:
        """A folder, the path or address of anything else, or a source as a request names it."""
        source = {"folder": str(place)} if isinstance(place, Path) else {"path": place} if isinstance(place, str) else place
        job = self.post("/api/v1/datasets", {"name": name, "kind": kind, "source": source})
        finished = self.finished_job(job["id"])
        assert finished["status"] == "succeeded", finished
        return name


@contextlib.contextmanager
def embedded(directory: Path, *, roots: Path, **environment: str) -> Iterator[Service]:
    """`noisy-student up` in a data directory of its own."""
    service = start_embedded(directory, roots=roots, **environment)
    try:
        yield service
    finally:
        service.close()


def start_embedded(directory: Path, *, roots: Path, **environment: str) -> Service:
    """Start `noisy-student up`, or start it again over the same data directory."""
    port = free_port()
    data = directory / "data"
    settings = {"NOISY_STUDENT_DATA_DIRECTORY": str(data), "NOISY_STUDENT_PORT": str(port), "NOISY_STUDENT_DATASET_ROOTS": str(roots)}
    processes = Processes(directory, {**settings, **environment})
    processes.start("up", str(BIN / "noisy-student"), "up")
    service = Service(processes, port=port, data_directory=data)
    service.wait_ready()
    service.use_key((data / "admin.key").read_text(encoding="utf-8").strip())
    return service


@contextlib.contextmanager
def fleet(directory: Path, *, roots: Path, database_url: str, redis_url: str, **environment: str) -> Iterator[Service]:
    """The commands of docker-compose.yml: an API and two Celery workers over PostgreSQL and Redis."""
    port = free_port()
    data = directory / "data"
    data.mkdir(exist_ok=True)
    settings = {
        "NOISY_STUDENT_DATA_DIRECTORY": str(data),
        "NOISY_STUDENT_DATABASE_URL": database_url,
        "NOISY_STUDENT_REDIS_URL": redis_url,
        "NOISY_STUDENT_PORT": str(port),
        "NOISY_STUDENT_DATASET_ROOTS": str(roots),
        **environment,
    }
    database = Database(_sqlalchemy_url(database_url))
    migrate(database)
    with database.transaction() as session:
        _, secret = create_api_key(session, name="test", scopes=list(SCOPES))
    database.close()
    processes = Processes(directory, settings)
    processes.start("api", sys.executable, "-m", "server")
    for name in ("worker-1", "worker-2"):
        start_celery_worker(processes, name)
    service = Service(processes, port=port, data_directory=data)
    service.use_key(secret)
    try:
        service.wait_ready()
        yield service
    finally:
        service.close()


def start_celery_worker(processes: Processes, name: str) -> None:
    """One full worker, as on a host of its own."""
    processes.start(name, str(BIN / "celery"), "-A", "workers.app", "worker", "-Q", "cpu", "-n", f"{name}@%h", "--loglevel", "INFO")


def _sqlalchemy_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://") if url.startswith("postgresql://") else url


def follow(service: Service, path: str, *, after: int | None = None, stop: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Read a stream of server-sent events until `stop` says so or it ends; each event has `id`, `event` and `data`."""
    import json

    events: list[dict[str, Any]] = []
    headers = {"Accept": "text/event-stream", **({} if after is None else {"Last-Event-ID": str(after)})}
    with service.client.stream("GET", path, headers=headers, timeout=httpx.Timeout(60, read=120)) as response:
        assert response.status_code == 200
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
                continue
            if "data" in fields:
                event = {
                    "id": int(fields["id"]) if "id" in fields else None,
                    "event": fields.get("event"),
                    "data": json.loads(fields["data"]),
                }
                events.append(event)
                if event["event"] == "end" or stop(event):
                    return events
            fields = {}
    return events
