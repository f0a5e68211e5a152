"""`noisy-student doctor`: what is wrong with this machine; with --verify, what is wrong with rows and files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import sqlalchemy as sa
import typer

from cli.invocation import Invocation, get_invocation, local_url, read_service_file
from cli.processes import check_port, is_locked
from cli.up import existing_database
from cli.verify import count_rows, find_defects
from core.db.schema import check_schema
from core.db.session import Database
from core.errors import PortInUse, SchemaMismatch, SetupError, StorageError
from core.settings import Settings
from core.storage import make_storage
from ml.cores import num_cores

LEAST_MEMORY_GB = 2.0
LEAST_DISK_GB = 5.0
IMPORT_SECONDS = 120
ANSWER_SECONDS = 5.0
Verdict = Literal["ok", "note", "bad"]
MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One look at the machine."""

    name: str
    verdict: Verdict
    message: str


def doctor(
    context: typer.Context,
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every invariant over the database and the stored files instead of the machine.")
    ] = False,
) -> int:
    """Say what is wrong with this machine; 1 when something is."""
    invocation = get_invocation(context)
    if verify:
        return _verify(invocation)
    findings = []
    for look in LOOKS:
        for finding in look(invocation.settings):
            findings.append(finding)
            invocation.output.say(f"{MARKS[finding.verdict]}  {finding.name}: {finding.message}")
    if invocation.output.as_json:
        invocation.output.result([asdict(finding) for finding in findings], "")
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


def _verify(invocation: Invocation) -> int:
    settings, output = invocation.settings, invocation.output
    with existing_database(settings) as database:
        defects = find_defects(database, make_storage(settings), orphan_seconds=settings.orphan_grace_seconds)
        counts = count_rows(database)
    looked = ", ".join(f"{number} {name}" for name, number in counts.items())
    if output.as_json:
        output.result({"defects": [defect.to_dict() for defect in defects], "checked": counts}, "")
    elif defects:
        output.say("\n".join(f"{defect.check}: {defect.subject} {defect.message}" for defect in defects))
        output.error(f"{len(defects)} invariants are broken ({looked})")
    else:
        output.say(f"nothing is wrong: {looked}")
    return 1 if defects else 0


Look = Iterator[Finding]


def _python(_settings: Settings) -> Look:
    version = ".".join(str(part) for part in sys.version_info[:3])
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("python", "ok" if fits else "bad", version if fits else f"{version}; 3.11, 3.12 or 3.13 is needed")


def _packages(_settings: Settings) -> Look:
    """Each in a process of its own: a broken torch crashes instead of raising."""
    programs = {
        "training": "import timm, torch; print(f'torch {torch.__version__}, timm {timm.__version__}, '"
        " f'{torch.cuda.get_device_name(0) if torch.cuda.is_available() else \"no GPU\"}')",
        "serving": "import fastapi, onnxruntime, uvicorn; print(f'fastapi {fastapi.__version__}, onnxruntime {onnxruntime.__version__}')",
    }
    for name, program in programs.items():
        try:
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            yield Finding(name, "bad", f"importing its packages took more than {IMPORT_SECONDS} s")
            continue
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"ended with {done.returncode}"]
        yield Finding(name, "ok" if done.returncode == 0 else "bad", lines[-1])


def _cores(_settings: Settings) -> Look:
    cores = num_cores()
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    limited = f", limited to {int(quota[0]) / int(quota[1]):.1f} of them" if quota and quota[0] != "max" else ""
    yield Finding("cores", "ok", f"{cores}{limited}")


def _memory(_settings: Settings) -> Look:
    lines = [line.split() for line in _read("/proc/meminfo").splitlines()]
    facts = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2 and words[1].isdecimal()}
    free = facts.get("MemAvailable", 0)
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal():
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        free = min(free, int(limit) - used)
    enough = free / 1e9 >= LEAST_MEMORY_GB
    yield Finding(
        "memory", "ok" if enough else "bad", f"{free / 1e9:.1f} GB free{'' if enough else f', a training needs {LEAST_MEMORY_GB:.0f}'}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _data_directory(settings: Settings) -> Look:
    directory = settings.data_directory.resolve()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("data directory", "bad", f"{existing} is not writable")
        return
    yield Finding("data directory", "ok", f"{directory}{'' if directory.exists() else ' (not there yet)'}")
    if is_locked(settings.data_directory / "lock"):
        yield look_at_service(settings)
    free = shutil.disk_usage(existing).free / 1e9
    enough = free >= LEAST_DISK_GB
    yield Finding("disk", "ok" if enough else "bad", f"{free:.1f} GB free{'' if enough else f', {LEAST_DISK_GB:.0f} are recommended'}")


def look_at_service(settings: Settings) -> Finding:
    """An `up` that holds the data directory answers, too."""
    service = read_service_file(settings.service_file)
    url = service["url"] if service else local_url(settings)
    try:
        answer = httpx.get(f"{url}/livez", timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        reason = (
            f"does not answer within {ANSWER_SECONDS:.0f} s" if isinstance(error, httpx.TimeoutException) else f"is out of reach: {error}"
        )
        return Finding("service", "bad", f"an `up` runs over this data directory, but {url} {reason}")
    verdict: Verdict = "ok" if answer.is_success else "bad"
    return Finding("service", verdict, f"an `up` runs over this data directory; {url}/livez answers {answer.status_code}")


def _database(settings: Settings) -> Look:
    if settings.database_url is None and not Path(settings.resolved_database_url.removeprefix("sqlite:///")).exists():
        yield Finding("database", "ok", "SQLite, made at the first start")
        return
    database = Database(settings.resolved_database_url)
    place = sa.make_url(database.url).render_as_string(hide_password=True)
    try:
        check_schema(database)
    except SchemaMismatch as error:
        yield Finding("database", "bad", error.message)
    except sa.exc.SQLAlchemyError as error:
        yield Finding("database", "bad", f"{place} does not answer: {_first_line(error)}")
    else:
        yield Finding("database", "ok", place)
    finally:
        database.close()


def _first_line(error: sa.exc.SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _storage(settings: Settings) -> Look:
    if settings.storage_url is None:
        yield Finding("storage", "ok", "in the data directory")
        return
    try:
        make_storage(settings).check()
    except (SetupError, StorageError) as error:
        yield Finding("storage", "bad", error.message)
    else:
        yield Finding("storage", "ok", f"{settings.storage_url} at {settings.s3_endpoint_url or 'AWS'} answers")


def _redis(settings: Settings) -> Look:
    if settings.redis_url is None:
        yield Finding("redis", "ok", "not used; the worker looks into the database")
        return
    try:
        import redis
    except ImportError:
        yield Finding(
            "redis",
            "bad",
            "NOISY_STUDENT_REDIS_URL is set, but the fleet's packages are missing: pip install 'noisy-student-server[fleet]'",
        )
        return
    try:
        with redis.Redis.from_url(settings.redis_url, socket_connect_timeout=3, socket_timeout=3) as connection:
            connection.ping()
    except (redis.RedisError, ValueError) as error:
        # Work goes on without it, by polling; only later.
        yield Finding("redis", "bad", f"does not answer: {error}")
    else:
        yield Finding("redis", "ok", "answers")


def _port(settings: Settings) -> Look:
    service = read_service_file(settings.service_file)
    if service is not None and is_locked(settings.data_directory / "lock"):
        yield Finding("port", "ok", f"the service runs at {service['url']}")
        return
    try:
        check_port(settings)
    except PortInUse:
        yield Finding("port", "bad", f"{settings.host}:{settings.port} is taken; choose another with --port or NOISY_STUDENT_PORT")
    else:
        yield Finding("port", "ok", f"{local_url(settings)} is free")


LOOKS: tuple[Callable[[Settings], Look], ...] = (_python, _packages, _cores, _memory, _data_directory, _database, _storage, _redis, _port)
