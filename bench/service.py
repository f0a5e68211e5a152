"""The service as processes, for the measurements that need one: `noisy-student up`, or API and Celery worker over Redis."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
START_SECONDS = 60.0
STOP_SECONDS = 30.0


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Service:
    """Processes of one data directory, and a client that holds the admin key."""

    directory: Path
    port: int
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process; its output goes to <name>.log in the directory."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=log, stderr=subprocess.STDOUT)
        self.processes[name] = process
        return process

    def stop(self) -> None:
        """Ask all processes to end, in the order in which they were started; kill what stays."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def is_ready(self) -> bool:
        """Whether /readyz answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def wait_ready(self, *, pause: float = 0.05) -> None:
        """TimeoutError with the logs' ends when it does not become ready."""
        end = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.url}/readyz did not answer within {START_SECONDS} s\n{self.logs()}")
            time.sleep(pause)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(self.directory.glob("*.log")))

    def fetch(self, path: str) -> bytes:
        """The body of a page, whatever its kind."""
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            body: bytes = response.read()
        return body

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The JSON answer; RuntimeError with the problem for a refusal."""
        given = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, method=method, headers=given)
        try:
            with urllib.request.urlopen(request, timeout=90) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as refused:
            raise RuntimeError(f"{method} {path}: {refused.code} {refused.read().decode()}") from refused

    def finished_job(self, job_id: str, *, seconds: float = 180) -> dict[str, Any]:
        """The job once it has succeeded."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job: dict[str, Any] = self.ask("GET", f"/api/v1/jobs/{job_id}", headers={"Prefer": "wait=10"})
            if job["status"] == "succeeded":
                return job
            if job["status"] in ("failed", "canceled"):
                raise RuntimeError(f"job {job_id} {job['status']}: {job['error']}")
        raise TimeoutError(f"job {job_id} did not end within {seconds} s\n{self.logs()}")


@contextlib.contextmanager
def embedded(directory: Path, *, roots: Path, **environment: str) -> Iterator[Service]:
    """`noisy-student up` over a data directory of its own."""
    service = _service(directory, roots, environment)
    service.start("up", str(BIN / "noisy-student"), "up")
    try:
        service.wait_ready()
        service.key = (directory / "data" / "admin.key").read_text(encoding="utf-8").strip()
        yield service
    finally:
        service.stop()


@contextlib.contextmanager
def with_broker(directory: Path, *, roots: Path, redis_url: str, database_url: str | None, num_workers: int = 1) -> Iterator[Service]:
    """An API and Celery workers over Redis; rows in PostgreSQL, or in SQLite when there is none."""
    environment = {"NOISY_STUDENT_REDIS_URL": redis_url} | ({"NOISY_STUDENT_DATABASE_URL": database_url} if database_url else {})
    service = _service(directory, roots, environment)
    migrate(service)
    service.start("api", sys.executable, "-m", "server")
    for number in range(num_workers):
        command = (str(BIN / "celery"), "-A", "workers.app", "worker", "-Q", "cpu", "-n", f"bench-{number}@%h", "--loglevel", "INFO")
        service.start(f"worker-{number}", *command)
    try:
        service.wait_ready()
        _wait_for_workers(service, num_workers)
        yield service
    finally:
        service.stop()


def _service(directory: Path, roots: Path, environment: dict[str, str]) -> Service:
    port = free_port()
    settings = {
        "NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data"),
        "NOISY_STUDENT_PORT": str(port),
        "NOISY_STUDENT_DATASET_ROOTS": str(roots),
    }
    return Service(directory, port, {**settings, **environment})


def migrate(service: Service) -> None:
    """Make the data directory, the tables and the first admin key."""
    environment = {**os.environ, **service.environment}
    subprocess.run([str(BIN / "noisy-student"), "migrate"], env=environment, check=True, capture_output=True)
    service.key = (service.directory / "data" / "admin.key").read_text(encoding="utf-8").strip()


def _wait_for_workers(service: Service, number: int) -> None:
    end = time.monotonic() + START_SECONDS
    while (there := len(service.ask("GET", "/api/v1/workers")["items"])) < number:
        if time.monotonic() > end:
            raise TimeoutError(f"{there} of {number} workers came up within {START_SECONDS} s\n{service.logs()}")
        time.sleep(0.1)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def peak_resident_bytes(pid: int) -> int:
    """The most resident memory that a process ever had; 0 when it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def program(name: str) -> str:
    """Full path of a program; FileNotFoundError that says which one is missing."""
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not on PATH; install it to measure this")
    return found
