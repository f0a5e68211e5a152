"""500 event streams on one API process while events are written: none has a gap or a double, and what else is asked is answered.

By hand: `python -m bench streams`, two minutes. Half of the streams follow jobs, half of them runs; each is cut now and then and comes
back with Last-Event-ID. Rows in PostgreSQL. Measured beside: the memory of the API, `/readyz` and a read before and during it,
transactions of the database, and how long after its writing an event arrives.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import random
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.measurement import Measurement, cpu_seconds
from bench.service import Service, free_port, migrate, resident_bytes
from core.db import jobs
from core.db.datasets import add_version, create_dataset
from core.db.runs import create_run, move_run
from core.db.session import Database
from core.db.tables import Job, Run
from core.settings import Settings
from ml.recipes import get_recipe
from ml.validation import to_dict
from tests.builders_services import create_database, running_postgresql

STREAMS = 500
RUNS = 10
JOBS_OF_RUN = 5
WRITE_SECONDS = 60.0
PERIOD_SECONDS = 0.5
"""In which every job reports once."""
IDLE_SECONDS = 15.0
CUTS = 3
END_SECONDS = 120.0
SEED = 5
_LINE_SECONDS = 60.0


@dataclass(slots=True)
class Stream:
    """One reader that must see 1, 2, 3 … and the end, whatever is cut."""

    path: str
    cut_after: list[int]
    """Numbers of events after which it hangs up and comes back."""
    last: int = 0
    gaps: int = 0
    doubles: int = 0
    connections: int = 0
    ended: bool = False
    lags: list[float] = field(default_factory=list)
    """Seconds from an event's time to its arrival, of those that arrived live."""

    async def follow(self, port: int, key: str) -> None:
        """Read to the end of the stream, in as many connections as it takes."""
        while not self.ended:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            self.connections += 1
            # Version 1.0: the answer comes without chunks.
            head = f"GET {self.path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nAccept: text/event-stream\r\n"
            writer.write(f"{head}Last-Event-ID: {self.last}\r\n\r\n".encode())
            try:
                status = await asyncio.wait_for(reader.readline(), _LINE_SECONDS)
                if b" 200 " not in status:
                    raise RuntimeError(f"{self.path} answers {status!r}")
                await self._read(reader)
            finally:
                writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await asyncio.wait_for(reader.readline(), _LINE_SECONDS):
            if line.startswith(b"id: "):
                number = int(line[4:])
                self.gaps += number > self.last + 1
                self.doubles += number <= self.last
                self.last = number
            elif line.startswith(b"event: end"):
                self.ended = True
                return
            elif line.startswith(b"data: ") and self.last % 20 == 0:
                self._note_lag(line)
            elif line == b"\n" and self.cut_after and self.last >= self.cut_after[0]:
                self.cut_after.pop(0)
                return

    def _note_lag(self, line: bytes) -> None:
        written = datetime.fromisoformat(json.loads(line[6:])["at"])
        self.lags.append((datetime.now(UTC) - written).total_seconds())


def measure() -> Measurement:
    _allow_files()
    found = Measurement(name="streams", details={"streams": STREAMS, "seed": SEED, "write_seconds": WRITE_SECONDS})
    directory = Path(tempfile.mkdtemp(prefix="bench-streams-"))
    try:
        with running_postgresql() as postgresql:
            url = create_database(postgresql, "streams")
            port = free_port()
            environment = {
                "NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data"),
                "NOISY_STUDENT_DATABASE_URL": url,
                "NOISY_STUDENT_PORT": str(port),
            }
            service = Service(directory, port, environment)
            migrate(service)
            database = Database(Settings(database_url=url).resolved_database_url)
            held = _start_jobs(database)
            service.start("api", sys.executable, "-m", "server")
            try:
                service.wait_ready()
                _measure(found, service, database, held)
            finally:
                service.stop()
                database.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _start_jobs(database: Database) -> list[Job]:
    """Some runs, each with a few jobs that run."""
    held = []
    with database.transaction() as session:
        versions = {}
        for kind in ("labeled", "unlabeled"):
            version, _ = add_version(session, create_dataset(session, name=kind, kind=kind), source={"folder": "/data"}, ingest=False)
            versions[kind] = version
        for number in range(RUNS):
            run, _ = create_run(
                session,
                name=f"run {number}",
                recipe=to_dict(get_recipe("digits")),
                iterations=0,
                labeled=versions["labeled"],
                unlabeled=versions["unlabeled"],
                validation=None,
                test=None,
                initial_generation_id=None,
            )
            more = [
                jobs.NewJob(kind="label", input={}, run_id=run.id, iteration=0, step="label", part=part) for part in range(1, JOBS_OF_RUN)
            ]
            jobs.enqueue(session, more)
        session.flush()
        while (job := jobs.claim(session, holder="bench", capabilities=["cpu", "cuda"], lease_seconds=3600)) is not None:
            held.append(job)
    assert len(held) == RUNS * JOBS_OF_RUN
    return held


class Writer(threading.Thread):
    """Reports for every job again and again, then ends the jobs and their runs."""

    def __init__(self, database: Database, held: Sequence[Job], seconds: float) -> None:
        super().__init__()
        self._database, self._held, self._seconds = database, held, seconds
        self.num_events = 0

    def run(self) -> None:
        generator = random.Random(SEED)
        end = time.monotonic() + self._seconds
        while (began := time.monotonic()) < end:
            for job in self._held:
                points = [("metric", {"loss": generator.random(), "step": self.num_events}) for _ in range(generator.randint(1, 3))]
                with self._database.transaction() as session:
                    assert jobs.report(session, job.id, token=job.token, items=points)
                self.num_events += len(points)
            time.sleep(max(0.0, began + PERIOD_SECONDS - time.monotonic()))
        for job in self._held:
            with self._database.transaction() as session:
                assert jobs.succeed(session, job.id, token=job.token, result={}) is not None
        for run_id in sorted({str(job.run_id) for job in self._held}):
            with self._database.transaction() as session:
                move_run(session, run_id, "completed")


class Asker(threading.Thread):
    """Asks for the same pages until it is stopped, and notes how long each took."""

    def __init__(self, service: Service, paths: Sequence[str]) -> None:
        super().__init__()
        self._service, self._paths = service, paths
        self.stop = threading.Event()
        self.seconds: dict[str, list[float]] = {path: [] for path in paths}

    def run(self) -> None:
        while not self.stop.wait(0.05):
            for path in self._paths:
                started = time.perf_counter()
                self._service.fetch(path)
                self.seconds[path].append(time.perf_counter() - started)

    def finish(self) -> dict[str, list[float]]:
        self.stop.set()
        self.join()
        return self.seconds


def _measure(found: Measurement, service: Service, database: Database, held: Sequence[Job]) -> None:
    paths = ("/readyz", f"/api/v1/jobs/{held[0].id}")
    rows = [_beside(service, database, "no streams", paths, seconds=IDLE_SECONDS)]
    memory = [resident_bytes(service.processes["api"].pid)]
    # A process of its own: what its interpreter does must not slow the writer.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        reading = pool.submit(follow_all, _make_streams(held), service.port, service.key)
        _wait_for_all(service)
        rows.append(_beside(service, database, f"{STREAMS} streams, nothing happens", paths, seconds=IDLE_SECONDS))
        memory.append(resident_bytes(service.processes["api"].pid))
        writer = Writer(database, held, WRITE_SECONDS)
        writer.start()
        rows.append(_beside(service, database, f"{STREAMS} streams, events are written", paths, seconds=WRITE_SECONDS))
        memory.append(resident_bytes(service.processes["api"].pid))
        writer.join()
        streams = reading.result(END_SECONDS)
    _judge(found, database, streams)
    lags = sorted(lag for stream in streams for lag in stream.lags)
    before, idle, busy = memory
    found.tables["Beside the streams"] = rows
    found.tables["Streams"] = [
        {
            "streams": len(streams),
            "connections": sum(stream.connections for stream in streams),
            "events written": writer.num_events,
            "events delivered": sum(stream.last for stream in streams),
            "an event's way, median s": statistics.median(lags),
            "99th percentile s": _high(lags),
        }
    ]
    found.tables["Memory of the API, MB"] = [
        {
            "before": before / 1e6,
            "streams open": idle / 1e6,
            "after a minute of events": busy / 1e6,
            "kB a stream, open": (idle - before) / 1e3 / STREAMS,
            "kB a stream, at work": (busy - before) / 1e3 / STREAMS,
        }
    ]
    found.figures |= {
        "streams-memory": (busy - before) / 1e6,
        "streams-read-beside": 1000 * max(rows[-1]["a read, p99 s"], rows[-1]["/readyz, p99 s"]),
    }


def _make_streams(held: Sequence[Job]) -> list[Stream]:
    generator = random.Random(SEED)
    runs = sorted({str(job.run_id) for job in held})
    followed = [f"/api/v1/jobs/{held[number % len(held)].id}/events" for number in range(STREAMS // 2)]
    followed += [f"/api/v1/runs/{runs[number % len(runs)]}/events" for number in range(STREAMS - len(followed))]
    return [Stream(path, sorted(generator.sample(range(10, 200), CUTS))) for path in followed]


def follow_all(streams: Sequence[Stream], port: int, key: str) -> Sequence[Stream]:
    """The streams after their end. A process can be told to do this."""

    async def follow() -> None:
        await asyncio.gather(*(stream.follow(port, key) for stream in streams))

    _allow_files()
    asyncio.run(follow())
    return streams


def _allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536), most))


def _wait_for_all(service: Service) -> None:
    """Until the API counts all of them."""
    end = time.monotonic() + END_SECONDS
    while f"noisy_student_event_streams {STREAMS:.1f}".encode() not in service.fetch("/metrics"):
        if time.monotonic() > end:
            raise TimeoutError(f"{STREAMS} streams did not begin within {END_SECONDS} s\n{service.logs()}")
        time.sleep(0.2)


def _beside(service: Service, database: Database, when: str, paths: tuple[str, str], *, seconds: float) -> dict[str, Any]:
    pid = service.processes["api"].pid
    asker = Asker(service, paths)
    transactions, used, began = _num_transactions(database), cpu_seconds(pid) or 0.0, time.monotonic()
    asker.start()
    time.sleep(seconds)
    times = asker.finish()
    passed = time.monotonic() - began
    ready, read = (sorted(times[path]) for path in paths)
    return {
        "": when,
        "asked": len(ready) + len(read),
        "/readyz, median s": statistics.median(ready),
        "/readyz, p99 s": _high(ready),
        "a read, median s": statistics.median(read),
        "a read, p99 s": _high(read),
        "transactions/s": (_num_transactions(database) - transactions) / passed,
        "CPU of the API": ((cpu_seconds(pid) or 0.0) - used) / passed,
    }


def _num_transactions(database: Database) -> int:
    """Of the database since it was made, by its own count, which lags a second behind."""
    with database.reading() as session:
        return int(
            session.execute(
                sa.text("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()")
            ).scalar_one()
        )


def _high(values: Sequence[float]) -> float:
    """The 99th percentile of sorted values."""
    return values[math.ceil(0.99 * len(values)) - 1]


def _judge(found: Measurement, database: Database, streams: Sequence[Stream]) -> None:
    """Every stream must have come to its end, and the last number to be what the row has counted."""
    with database.reading() as session:
        counted = {f"/api/v1/jobs/{row_id}/events": number for row_id, number in session.execute(sa.select(Job.id, Job.num_events))}
        counted |= {f"/api/v1/runs/{row_id}/events": number for row_id, number in session.execute(sa.select(Run.id, Run.num_events))}
    missing = sum(stream.gaps for stream in streams) + sum(not stream.ended or stream.last != counted[stream.path] for stream in streams)
    found.figures |= {"streams-gaps": float(missing), "streams-doubles": float(sum(stream.doubles for stream in streams))}
    found.details["unfinished"] = [stream.path for stream in streams if not stream.ended][:10]
