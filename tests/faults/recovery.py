"""When is the service itself again? When it is ready, every interrupted job is in somebody's hands, and a new one gets through."""

from __future__ import annotations

import time
from typing import Any

from core.db.tables import Job
from core.lifecycle import JOB_TERMINAL
from tests.faults.fault import Scene
from tests.faults.stage import LEASE_SECONDS
from workers.housekeeping import SINGLETON_SECONDS

RESTART_SECONDS = 51.0
"""A process is started again and has its packages: seconds on a free machine, most of a minute on one that starts five at once."""
BOUND_SECONDS = LEASE_SECONDS + SINGLETON_SECONDS + RESTART_SECONDS
"""A lease runs out, the singleton lease with it, and whoever died is back."""


class NotRecovered(Exception):
    """Still not itself after the bound."""


def wait_for_recovery(scene: Scene, before: dict[str, Job]) -> float:
    """Seconds until then, from now on; `before` are the jobs that were running when the fault began. NotRecovered after the bound."""
    started = time.monotonic()
    probe = scene.load.add_dataset(9_000_000 + scene.number)
    mark: dict[str, Job] = {}
    while True:
        waiting = _still_waiting(scene, before, mark, probe.id)
        seconds = time.monotonic() - started
        if not waiting:
            return seconds
        if seconds > BOUND_SECONDS:
            raise NotRecovered(f"after {seconds:.0f} s: {', '.join(waiting)}")
        time.sleep(0.1)


def _still_waiting(scene: Scene, before: dict[str, Job], mark: dict[str, Job], probe_id: str) -> list[str]:
    """What recovery waits for, in words. `mark` remembers the jobs as they were at the first look."""
    found = scene.stage.find_jobs([*before, probe_id])
    if found is None:
        return ["the database does not answer"]
    waiting = [] if scene.stage.is_ready() else ["the API is not ready"]
    if not mark:
        mark.update(found)
    waiting += [f"job {job_id} ({job.kind}) is in nobody's hands" for job_id, job in before.items() if not _moves(found, mark, job_id, job)]
    probe = found.get(probe_id)
    if probe is None or probe.status not in JOB_TERMINAL:
        waiting.append(f"the new job {probe_id} is {'not there' if probe is None else probe.status}")
    return waiting


def _moves(found: dict[str, Job], mark: dict[str, Job], job_id: str, before: Any) -> bool:
    """It has ended, or was claimed again, or its lease was prolonged since the fault was over."""
    job, marked = found.get(job_id), mark.get(job_id)
    if job is None or marked is None:
        return False
    if job.status in JOB_TERMINAL or job.token > before.token:
        return True
    return job.lease_until is not None and marked.lease_until is not None and job.lease_until > marked.lease_until
