"""5 000 jobs shared by 16 claiming processes on PostgreSQL, and by 8 on SQLite: claims that came twice, and claims a second.

By hand: `python -m bench claims`, a few minutes. Each claim and each finish is a transaction of its own, with its event, as workers make
them. SQLite flushes every commit to the disk; PostgreSQL here does not.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from bench.measurement import Measurement, summary
from bench.service import Service, migrate
from core.db import jobs
from core.db.session import Database
from core.db.tables import Event
from core.settings import Settings
from tests.builders_services import create_database, running_postgresql

JOBS = 5000
CLAIMERS = {"postgresql": 16, "sqlite": 8}


def measure() -> Measurement:
    found = Measurement(name="claims", details={"jobs": JOBS})
    rows = []
    directory = Path(tempfile.mkdtemp(prefix="bench-claims-"))
    try:
        with running_postgresql() as postgresql:
            urls = {"postgresql": create_database(postgresql, "claims"), "sqlite": f"sqlite:///{directory / 'claims.sqlite3'}"}
            for name, url in urls.items():
                environment = {"NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data"), "NOISY_STUDENT_DATABASE_URL": url}
                migrate(Service(directory, 0, environment))
                rows.append(_share(found, name, url))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    found.tables[f"{JOBS} jobs claimed and finished"] = rows
    return found


def claim_until_empty(url: str, holder: str) -> tuple[list[str], list[float]]:
    """Claim and finish one job after another: their ids, and the seconds that each claim took."""
    database = Database(Settings(database_url=url).resolved_database_url)
    got: list[str] = []
    seconds: list[float] = []
    while True:
        started = time.perf_counter()
        with database.transaction() as session:
            job = jobs.claim(session, holder=holder, capabilities=["cpu"], lease_seconds=600)
        if job is None:
            database.close()
            return got, seconds
        seconds.append(time.perf_counter() - started)
        got.append(job.id)
        with database.transaction() as session:
            if jobs.succeed(session, job.id, token=job.token, result={"holder": holder}) is None:
                raise RuntimeError(f"{holder} claimed {job.id} and was fenced")


def _share(found: Measurement, name: str, url: str) -> dict[str, object]:
    database = Database(Settings(database_url=url).resolved_database_url)
    with database.transaction() as session:
        wanted = {job.id for job in jobs.enqueue(session, [jobs.NewJob(kind="ingest", input={}) for _ in range(JOBS)])}
    # One process imports, the others are copies of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(CLAIMERS[name], mp_context=context) as pool:
        parts = [pool.submit(claim_until_empty, url, f"process-{number}") for number in range(CLAIMERS[name])]
        results = [part.result() for part in parts]
    got = [job_id for ids, _ in results for job_id in ids]
    with database.reading() as session:
        moments = sa.select(sa.func.min(Event.at), sa.func.max(Event.at)).where(Event.kind.in_(("started", "succeeded")))
        first, last = session.execute(moments).one()
        started = session.scalar(sa.select(sa.func.count()).select_from(Event).where(Event.kind == "started"))
    database.close()
    seconds = (last - first).total_seconds()
    claims = [value for _, values in results for value in values]
    # Ids that came twice, and starts that nobody was told of.
    found.figures[f"claims-double-{name}"] = float(len(got) - len(set(got)) + abs((started or 0) - JOBS) + len(wanted ^ set(got)))
    return {
        "database": name,
        "claimers": CLAIMERS[name],
        "seconds": seconds,
        "claims and finishes a second": JOBS / seconds,
        "a claim, median s": summary(claims)["median"],
        "longest s": summary(claims)["highest"],
        "fewest by one claimer": min(len(ids) for ids, _ in results),
        "most": max(len(ids) for ids, _ in results),
    }
