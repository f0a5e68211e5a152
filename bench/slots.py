"""One labeling job on three one-slot workers of one host: how much of the time between its first and last moment the slots were busy.

By hand: `python -m bench slots`, some three minutes. PostgreSQL, Redis, Celery workers, EfficientNet-B0 on photographs. A slot is busy
from `started` to `succeeded` of each shard, as the jobs' own events tell; the span is that of all shards together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import sqlalchemy as sa

from bench.labeling import export
from bench.measurement import Measurement, summary
from bench.photographs import photographs
from bench.service import Service, with_broker
from core.db.session import Database
from core.db.tables import Event, Job
from core.settings import Settings
from tests.builders_services import create_database, running_postgresql, running_redis

WORKERS = 3
IMAGES = 600
SHARD_SIZE = 10
SECONDS = 600.0

Stretch = tuple[float, float]
"""When a slot began and ended a shard, in seconds."""


def measure() -> Measurement:
    found = Measurement(name="slots", details={"workers": WORKERS, "images": IMAGES, "shard_size": SHARD_SIZE})
    pool = photographs(IMAGES)
    directory = Path(tempfile.mkdtemp(prefix="bench-slots-"))
    try:
        # Both lie below one root: the pool's own folder is shared with other measurements.
        (directory / "roots").mkdir()
        shutil.copytree(pool, directory / "roots" / "pool")
        export("photos-224", directory / "roots" / "teacher")
        with running_postgresql() as postgresql, running_redis() as redis_url:
            url = create_database(postgresql, "slots")
            with with_broker(directory, roots=directory / "roots", redis_url=redis_url, database_url=url, num_workers=WORKERS) as service:
                set_id = _label(service, directory / "roots")
            database = Database(Settings(database_url=url).resolved_database_url)
            stretches = _read_stretches(database, set_id)
            database.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    _judge(found, stretches)
    return found


def _label(service: Service, roots: Path) -> str:
    """Import the teacher, read the pool, label it; the set's id."""
    imported = service.ask("POST", "/api/v1/generations/import", {"folder": str(roots / "teacher"), "name": "teacher"})
    ingested = service.ask("POST", "/api/v1/datasets", {"name": "pool", "kind": "unlabeled", "source": {"folder": str(roots / "pool")}})
    for job in (imported, ingested):
        service.finished_job(job["id"], seconds=SECONDS)
    body = {
        "generation": service.ask("GET", "/api/v1/generations")["items"][0]["id"],
        "unlabeled": "pool",
        "labeling": {"shard_size": SHARD_SIZE},
        "runtime": {"device": "cpu", "num_threads": 1},
    }
    made = service.ask("POST", "/api/v1/pseudo-label-sets", body)
    for job_id in made["jobs"]:
        service.finished_job(job_id, seconds=SECONDS)
    return str(made["id"])


def _read_stretches(database: Database, set_id: str) -> dict[str, list[Stretch]]:
    """By worker, in order."""
    found: dict[str, list[Stretch]] = defaultdict(list)
    begun: dict[str, tuple[str, float]] = {}
    with database.reading() as session:
        query = sa.select(Event).join(Job, Job.id == Event.job_id).where(Job.pseudo_label_set_id == set_id, Job.kind == "label")
        for event in session.scalars(query.order_by(Event.at)):
            if event.kind == "started":
                begun[event.job_id] = event.data["worker"], event.at.timestamp()
            elif event.kind == "succeeded":
                worker, started = begun[event.job_id]
                found[worker].append((started, event.at.timestamp()))
    return found


def _judge(found: Measurement, stretches: dict[str, list[Stretch]]) -> None:
    """Busy time, and where the rest went: before a worker's first shard, between two, after its last."""
    first = min(start for of_worker in stretches.values() for start, _ in of_worker)
    last = max(end for of_worker in stretches.values() for _, end in of_worker)
    span, rows, gaps = last - first, [], []
    for number, (_, of_worker) in enumerate(sorted(stretches.items())):
        between = [after[0] - before[1] for before, after in pairwise(of_worker)]
        gaps += between
        rows.append(
            {
                "worker": number,
                "shards": len(of_worker),
                "busy s": sum(end - start for start, end in of_worker),
                "before the first s": of_worker[0][0] - first,
                "between two s": sum(between),
                "after the last s": last - of_worker[-1][1],
                "longest pause s": max(between),
            }
        )
    found.tables[f"{WORKERS} one-slot workers, span {span:.1f} s"] = rows
    found.details |= {"span": span, "pauses": summary(gaps), "stretches": [stretches[name] for name in sorted(stretches)]}
    found.figures["slots-busy"] = sum(float(row["busy s"]) for row in rows) / (WORKERS * span)
