"""What the service costs before it does anything: imports, readiness, resident memory, and that torch stays out of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measurement import Measurement, interleaved, list_descendants, summary, typical_seconds
from bench.photographs import photographs, small_photographs
from bench.service import Service, command_line, embedded, free_port, migrate, resident_bytes

REPEATS = 5
_IMPORT = "import time; started = time.perf_counter(); import server.app; print(time.perf_counter() - started)"
_PACKAGES = """
import sys
import server.app
own = {"server", "core", "ml"}
tops = dict.fromkeys(name for name in sys.modules if name.partition(".")[0] not in own | set(sys.stdlib_module_names))
print(*(name for name in tops if not name.startswith("__")))
"""
_IMPORT_PACKAGES = """
import importlib, sys, time
started = time.perf_counter()
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        # Made by its package as it runs, so it has come with it.
        continue
print(time.perf_counter() - started)
"""
_FOREIGN = """
import sys
from server.app import create_app
create_app()
print(sum(name.partition(".")[0] in ("torch", "timm", "torchvision") for name in sys.modules))
"""
_PAGES = (
    "/livez",
    "/openapi.json",
    "/docs",
    "/metrics",
    "/api/v1/datasets",
    "/api/v1/jobs",
    "/api/v1/runs",
    "/api/v1/workers",
    "/api/v1/recipes",
)


def measure() -> Measurement:
    found = Measurement(name="startup", details={"repeats": REPEATS})
    directory = Path(tempfile.mkdtemp(prefix="bench-startup-"))
    try:
        names = _run(_PACKAGES).split()
        parts = {
            "import": lambda: float(_run(_IMPORT)),
            "packages": lambda: float(_run(_IMPORT_PACKAGES, *names)),
            "ready": lambda: _ready_seconds(directory),
        }
        turns = interleaved(parts, repeats=REPEATS, most=REPEATS + 3)
        memory = _measure_memory(directory)
    finally:
        shutil.rmtree(directory)
    found.figures |= {
        "server-import": typical_seconds(turns, "import"),
        "readyz": typical_seconds(turns, "ready"),
        "api-memory": memory["api"],
        "supervisor-memory": memory["supervisor"],
        "api-torch-modules": memory["torch modules"],
    }
    found.tables["Start-up, seconds"] = [
        {"what": "import of server.app", **summary(turns["import"])},
        {"what": "of it the packages that it needs, alone", **summary(turns["packages"])},
        {"what": "/readyz after the start of `python -m server`", **summary(turns["ready"])},
    ]
    found.tables["Resident memory after requests and an ingestion, MB (10^6 bytes)"] = [
        {"process": name, "MB": memory[name]} for name in ("api", "supervisor", "parent")
    ]
    found.details |= {"turns": turns, "memory": memory}
    return found


def _run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


def _ready_seconds(directory: Path) -> float:
    """From the start of the API's process to the first 200, over a database that is there."""
    data = directory / "ready"
    data.mkdir(exist_ok=True)
    port = free_port()
    service = Service(data, port, {"NOISY_STUDENT_DATA_DIRECTORY": str(data / "data"), "NOISY_STUDENT_PORT": str(port)})
    if not (data / "data").exists():
        migrate(service)
    started = time.perf_counter()
    service.start("api", sys.executable, "-m", "server")
    try:
        service.wait_ready(pause=0.01)
        return time.perf_counter() - started
    finally:
        service.stop()


def _measure_memory(directory: Path) -> dict[str, float]:
    """Of a service that has answered every page and ingested photographs."""
    home = directory / "memory"
    home.mkdir()
    roots = small_photographs(200).parent
    with embedded(home, roots=roots) as service:
        body = {"name": "small", "kind": "unlabeled", "source": {"folder": str(photographs(400))}}
        service.finished_job(service.ask("POST", "/api/v1/datasets", body)["id"])
        for page in _PAGES * 20:
            service.fetch(page)
        pids = {command_line(pid): pid for pid in list_descendants(service.processes["up"].pid)}
        api = next(pid for line, pid in pids.items() if line.endswith("-m server"))
        supervisor = next(pid for line, pid in pids.items() if line.endswith("-m workers"))
        mapped = {line.split()[-1] for line in Path(f"/proc/{api}/maps").read_text().splitlines()}
        libraries = [path for path in mapped if any(f"/{name}/" in path for name in ("torch", "timm", "torchvision"))]
        modules = int(subprocess.run([sys.executable, "-c", _FOREIGN], check=True, capture_output=True, text=True, cwd=home).stdout)
        return {
            "api": resident_bytes(api) / 1e6,
            "supervisor": resident_bytes(supervisor) / 1e6,
            "parent": resident_bytes(service.processes["up"].pid) / 1e6,
            "torch modules": float(modules + len(libraries)),
        }
