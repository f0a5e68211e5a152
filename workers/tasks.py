"""The one Celery task. It does no work: it tells this worker's supervisor that a job waits; the row decides who runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery, Task

from core.logs import get_log
from core.queue import TASK_NAME
from workers.supervisor import Supervisor

MOST_TURNS = 5
"""How often draining workers hand one hint on. Each turn may lead to one of them again; where there are no others, it must end."""


def register(app: Celery, find_supervisor: Callable[[], Supervisor | None]) -> Any:
    """Add `run_job` to the app; `find_supervisor` gives the one of this process, None while it is not up."""

    @app.task(name=TASK_NAME, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def run_job(task: Task, job_id: str, handed_on: int = 0) -> None:
        """Wake a slot for this job, or hand the hint on to another worker. A draining worker does so at once, a busy one after a while."""
        supervisor = find_supervisor()
        if supervisor is None:
            return
        log = get_log().bind(task_id=task.request.id, job_id=job_id)
        drains = supervisor.drains()
        if not drains and supervisor.wake(job_id):
            log.info("task.woke_job", worker=supervisor.name)
            return
        capability = supervisor.find_waiting(job_id) if handed_on < (MOST_TURNS if drains else 1) else None
        if capability is not None:
            # A hint that stayed here would wait for this worker, while another one is idle. When all are busy, hints must not
            # go round and round: the slot that becomes free looks by itself.
            app.send_task(TASK_NAME, args=[job_id], kwargs={"handed_on": handed_on + 1}, queue=capability, retry=False, ignore_result=True)

    return run_job
