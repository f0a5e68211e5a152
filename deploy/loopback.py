"""From a container's command and environment to a process of this machine: addresses become ports of loopback, volumes become folders."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.compose_file import ComposeService
from tests.builders_services import find_postgresql, free_port, running_as, unprivileged_user

BIN = Path(sys.executable).parent
PROXY_CONFIGURATION = Path(__file__).resolve().parent / "haproxy.cfg"
PUBLIC = "proxy"
# What the containers' ports are called in the file, by service.
CONTAINER_PORTS = {"postgres": 5432, "redis": 6379, "storage": 9000, "api": 8000, "predictor": 8001, PUBLIC: 8080}


@dataclass(frozen=True, slots=True)
class Start:
    """How one process of this machine is started."""

    command: list[str]
    environment: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    """For `subprocess.Popen`."""


@dataclass
class Loopback:
    """Ports and folders of one fleet."""

    directory: Path
    replicas: Mapping[str, int]
    """Service → how many; one where it is not named."""
    shares_data: bool
    """Whether all processes see one data directory, as the containers of one host do; else each has its own, as hosts have."""
    ports: dict[str, int] = field(default_factory=dict)
    further: Mapping[str, str] = field(default_factory=dict)
    """Variables beyond the file's, for the processes of this project."""
    slots: Mapping[str, int] = field(default_factory=dict)
    """Worker process → attempts at a time, where it is not the file's number."""

    def names(self, service: str) -> list[str]:
        """The processes of a service."""
        number = self.replicas.get(service, 1)
        return [service] if number == 1 else [f"{service}-{place}" for place in range(1, number + 1)]

    def port(self, name: str) -> int:
        """The process's own port, the same for as long as the fleet lives."""
        if name not in self.ports:
            self.ports[name] = free_port()
        return self.ports[name]

    def start(self, service: ComposeService, name: str) -> Start:
        """The command and environment that `name`, a process of `service`, gets here."""
        prepare = {"postgres": self._start_postgres, "redis": self._start_redis, PUBLIC: self._start_proxy}.get(service.name)
        return prepare(service) if prepare is not None else Start(self._command(service, name), self._environment(service, name))

    def health_check(self, service: ComposeService, name: str) -> Start | None:
        """The file's own check, about this process."""
        if service.name == "redis":
            return Start(["redis-cli", "-p", str(self.port("redis")), *service.health_check[1:]], {}) if service.health_check else None
        if service.health_check is None:
            return None
        port = CONTAINER_PORTS.get(service.name)
        words = [re.sub(rf":{port}\b", f":{self.port(name)}", word) if port else word for word in service.health_check]
        return Start(_find(words), self._environment(service, name))

    def data_directory(self, name: str) -> Path:
        """Where the process keeps what belongs to its host."""
        return self.directory / "data" if self.shares_data else self.directory / "hosts" / name

    @property
    def datasets(self) -> Path:
        """The folder below which datasets lie, the same for all."""
        return self.directory / "datasets"

    @property
    def postgres(self) -> Path:
        """The cluster's folder. PostgreSQL does not run as root, and its user cannot look into everybody's folders."""
        if unprivileged_user() is None:
            return self.directory / "postgres"
        return Path("/var/tmp") / f"noisy-student-fleet-{hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]}" / "postgres"  # noqa: S108  its own user's folder, 0700

    def remove_cluster(self) -> None:
        """Remove PostgreSQL's folder, which may lie outside of the fleet's directory."""
        shutil.rmtree(self.postgres, ignore_errors=True)

    def _environment(self, service: ComposeService, name: str) -> dict[str, str]:
        environment = {key: self._place(value) for key, value in service.environment.items()}
        own = {
            "NOISY_STUDENT_DATA_DIRECTORY": str(self.data_directory(name)),
            "NOISY_STUDENT_DATASET_ROOTS": str(self.datasets),
            "NOISY_STUDENT_HOST": "127.0.0.1",
            "NOISY_STUDENT_PORT": str(self.port(name)) if service.name in CONTAINER_PORTS else "",
        }
        if name in self.slots:
            own["NOISY_STUDENT_SLOTS"] = str(self.slots[name])
        ours = self.further if "NOISY_STUDENT_DATA_DIRECTORY" in environment else {}
        return environment | {key: value for key, value in own.items() if key in environment} | dict(ours)

    def _command(self, service: ComposeService, name: str) -> list[str]:
        command = _find([*service.entrypoint, *map(self._place, service.command)])
        # Containers have host names of their own; here Celery must be told.
        return [*command, "-n", f"{name}@%h"] if "celery" in service.command else command

    def _place(self, value: str) -> str:
        for service, port in CONTAINER_PORTS.items():
            value = value.replace(f"{service}:{port}", f"127.0.0.1:{self.port(service)}")
        return value.replace("/objects", str(self.directory / "objects")).replace(":9000 ", f"127.0.0.1:{self.port('storage')} ")

    def _start_redis(self, service: ComposeService) -> Start:
        folder = self.directory / "redis"
        folder.mkdir(parents=True, exist_ok=True)
        return Start([*service.command, "--port", str(self.port("redis")), "--bind", "127.0.0.1", "--dir", str(folder)], {})

    def _start_postgres(self, service: ComposeService) -> Start:
        """As the image's entry point does: the first start makes the cluster, the user and the database."""
        data, user = self.postgres, unprivileged_user()
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir(parents=True)
            if user is not None:
                shutil.chown(data, user)
            self._make_cluster(data, service.environment, user)
        server = [find_postgresql("postgres"), "-D", str(data), "-k", "", "-p", str(self.port("postgres"))]
        return Start([*server, "-c", "listen_addresses=127.0.0.1"], {}, {"cwd": "/", **running_as(user)})

    def _make_cluster(self, data: Path, environment: Mapping[str, str], user: str | None) -> None:
        options: dict[str, Any] = {"capture_output": True, "cwd": "/", **running_as(user)}
        name, database, password = (environment[f"POSTGRES_{word}"] for word in ("USER", "DB", "PASSWORD"))
        secret = data.with_name("postgres-password")
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(password)
        if user is not None:
            shutil.chown(secret, user)
        initdb = [find_postgresql("initdb"), "-D", str(data), "-U", name, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8"]
        try:
            subprocess.run([*initdb, "--no-locale"], check=True, **options)
        finally:
            secret.unlink()
        single = [find_postgresql("postgres"), "--single", "-D", str(data), "postgres"]
        subprocess.run(single, check=True, input=f'CREATE DATABASE "{database}"\n'.encode(), **options)

    def _start_proxy(self, service: ComposeService) -> Start:
        """The same configuration, with the replicas' addresses instead of names that only containers can look up."""
        lines: list[str] = []
        for line in PROXY_CONFIGURATION.read_text(encoding="utf-8").splitlines():
            template = re.fullmatch(r"(\s+)server-template (\w+) \d+ (\w+):\d+", line)
            if template is None:
                lines.append(line.replace(" resolvers containers", "").replace("bind :8080", f"bind 127.0.0.1:{self.port(PUBLIC)}"))
            else:
                lines += [f"{template[1]}server {name} 127.0.0.1:{self.port(name)}" for name in self.names(template[3])]
        path = self.directory / "haproxy.cfg"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Start([*_find(service.command)[:-1], str(path)], {})


def _find(words: Sequence[str]) -> list[str]:
    """The programs of this environment: a container has nothing else on its PATH."""
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    return [str(BIN / words[0]), *words[1:]] if os.access(BIN / words[0], os.X_OK) else list(words)
