"""What a worker says of itself at its start: devices, cores, memory, versions, and which code it runs. Asks the system, never torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.db.workers import WorkerDescription
from core.version import VERSION
from workers.processes import boot_identity, total_memory_bytes

ROOMS = ("core", "ml", "workers")
"""What decides how a job is done; API and command line may differ without harm."""
SUFFIXES = (".py", ".txt")
GPUS = Path("/proc/driver/nvidia/gpus")
_PACKAGES = ("torch", "timm", "torchvision")


def describe_worker(name: str, *, capabilities: Sequence[str], slots: int) -> WorkerDescription:
    """This process, as others may see it."""
    return WorkerDescription(
        name=name,
        host=socket.gethostname(),
        boot_id=boot_identity(),
        pid=os.getpid(),
        capabilities=tuple(capabilities),
        slots=slots,
        version=VERSION,
        code_digest=digest_code(),
        facts=find_facts(capabilities),
    )


def find_facts(capabilities: Sequence[str]) -> dict[str, Any]:
    """Devices, cores, memory and versions of this host. None is what cannot be known without loading a driver's library."""
    return {
        "devices": find_devices() if "cuda" in capabilities else [],
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": total_memory_bytes(),
        "python": platform.python_version(),
        **{package: _version_of(package) for package in _PACKAGES},
        "queues": sorted(capabilities),
    }


def find_devices(directory: Path = GPUS) -> list[dict[str, Any]]:
    """The GPUs that the driver shows, by name; it does not tell their memory here."""
    return [{"kind": "cuda", "name": _model_in(path / "information"), "memory_bytes": None} for path in sorted(directory.glob("*"))]


def _model_in(path: Path) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((value.strip() for name, _, value in (line.partition(":") for line in lines) if name == "Model"), None)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest_code(directory: Path | None = None) -> str:
    """SHA-256 over the sources of the rooms that do jobs: two workers with the same one run the same code."""
    directory = directory or Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in _sources(directory):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(directory: Path) -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted(path for path in (directory / room).rglob("*") if path.suffix in SUFFIXES and path.is_file())
