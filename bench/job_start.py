"""From the acceptance of a job to the start of its first attempt, as the job's own events tell: embedded, and with Redis."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.measurement import Measurement, summary
from bench.photographs import small_photographs
from bench.service import Service, embedded, with_broker
from tests.builders_services import create_database, running_postgresql, running_redis

JOBS = 20
SEED = 4
_LONGEST_PAUSE_SECONDS = 1.2


def measure() -> Measurement:
    found = Measurement(name="job_start", details={"seed": SEED, "jobs": JOBS})
    rows = []
    for identity, words, services in (
        ("job-start-embedded", "embedded: SQLite, polling", _embedded),
        ("job-start-redis", "Celery worker: PostgreSQL and Redis", _with_redis),
    ):
        directory = Path(tempfile.mkdtemp(prefix="bench-job-start-"))
        try:
            with services(directory) as service:
                seconds = _job_starts(service)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        found.figures[identity] = _percentile(seconds, 0.95)
        found.details[identity] = seconds
        rows.append({"service": words, "jobs": JOBS, **summary(seconds), "95th percentile": found.figures[identity]})
    found.tables["Job start: accepted → started, seconds"] = rows
    return found


@contextlib.contextmanager
def _embedded(directory: Path) -> Iterator[Service]:
    with embedded(directory, roots=_images().parent) as service:
        yield service


@contextlib.contextmanager
def _with_redis(directory: Path) -> Iterator[Service]:
    with running_postgresql() as postgresql, running_redis() as redis_url:
        database_url = create_database(postgresql, "bench")
        with with_broker(directory, roots=_images().parent, redis_url=redis_url, database_url=database_url) as service:
            yield service


def _images() -> Path:
    return small_photographs(20)


def _job_starts(service: Service) -> list[float]:
    """One ingestion after another, each at a random moment of the worker's clock; the first, which finds all cold, does not count."""
    generator = random.Random(SEED)
    seconds = []
    for number in range(JOBS + 1):
        body = {"name": f"pool-{number}", "kind": "unlabeled", "source": {"folder": str(_images())}}
        job = service.ask("POST", "/api/v1/datasets", body)
        service.finished_job(job["id"])
        events = service.ask("GET", f"/api/v1/jobs/{job['id']}/events")["items"]
        seconds.append(_moment(events, "started") - _moment(events, "queued"))
        time.sleep(generator.uniform(0, _LONGEST_PAUSE_SECONDS))
    return seconds[1:]


def _moment(events: list[dict[str, Any]], kind: str) -> float:
    found = next(event for event in events if event["kind"] == kind)
    return datetime.fromisoformat(found["at"]).timestamp()


def _percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
