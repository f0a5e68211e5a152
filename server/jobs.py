"""Jobs: what was asked for, how far it is, and what may be done about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Depends, Header, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from core.db import jobs as rows
from core.db.events import list_metrics
from core.db.files import list_files
from core.db.pseudo_labels import hold_set
from core.db.runs import hold_run, move_run
from core.db.tables import DatasetVersion, Iteration, Job
from core.errors import NotFound, WrongState
from server.dependencies import Services, ServicesDep, make_router
from server.idempotency import OnceDep
from server.job_views import JobView, accepted_job, show_job, show_jobs
from server.openapi import problems
from server.pages import Page, PageDep, read_page
from server.progress import JOB_EVENTS, EventPage, Source, answer_events, read_events

router = make_router("jobs")

MAX_WAIT_SECONDS = 30
LOG_BYTES = 64 * 1024
METRICS = Source("job", Job, list_metrics, lambda event: event.number, JOB_EVENTS.ended)
PHASE_OF_STEP = {"label": "labeling", "select": "selecting"}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": "id: 1\nevent: queued\ndata: {…}\n\n"}}}
}

JobStatus = Literal["queued", "running", "succeeded", "failed", "canceled"]
JobKind = Literal["ingest", "split", "train", "label", "select", "predict", "import"]
After = Annotated[int | None, Query(ge=0, le=10**15, description="Number of the last event you have.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Events a page.")]


class LogView(BaseModel):
    """The end of what an attempt wrote to its standard error."""

    job_id: str
    attempt: int
    attempts: list[int]
    """Attempts that left a log."""
    text: str
    truncated: bool
    """The log is longer; this is its end."""


@router.get("/jobs", summary="List jobs")
def list_jobs(
    services: ServicesDep, page: PageDep, status: JobStatus | None = None, kind: JobKind | None = None, run_id: str | None = None
) -> Page[JobView]:
    """Newest first."""
    cursors = services.cursors
    given = [(column, value) for column, value in ((Job.run_id, run_id), (Job.status, status), (Job.kind, kind)) if value is not None]
    query = sa.select(Job).where(*(column == value for column, value in given[1:]))
    listing = f"jobs?{status}&{kind}&{run_id}"
    with services.database.reading() as session:
        found, cursor = read_page(session, query, Job.id, page, cursors=cursors, listing=listing, among=given[0] if given else None)
        return Page(items=show_jobs(session, found, services.settings), next_cursor=cursor)


async def wait_as_preferred(
    job_id: str,
    services: ServicesDep,
    response: Response,
    prefer: Annotated[
        str | None, Header(description=f"`wait=10` answers when the job ends, at most {MAX_WAIT_SECONDS} seconds later.")
    ] = None,
) -> None:
    """Dependency: hold the answer back until the job ends or the preferred time is over, without holding a thread."""
    wanted = re.search(r"(?:^|[,;\s])wait=(\d{1,6})(?:$|[,;\s])", prefer or "")
    if wanted is None:
        return
    seconds = min(int(wanted[1]), MAX_WAIT_SECONDS)
    # Checked first, because nobody would ever wake a wait for a job that is not there.
    job = await run_in_threadpool(_read_job, services, job_id)
    if job.status not in JOB_EVENTS.ended:
        await services.progress.wait_for_end(JOB_EVENTS, job_id, seconds)
    response.headers["Preference-Applied"] = f"wait={seconds}"


def _read_job(services: Services, job_id: str) -> JobView:
    with services.database.reading() as session:
        return show_job(session, rows.get_job(session, job_id), services.settings)


@router.get("/jobs/{job_id}", summary="Read a job", responses=problems(404), dependencies=[Depends(wait_as_preferred)])
def get_job(job_id: str, services: ServicesDep) -> JobView:
    """Always 200, whatever became of the job. Polling? Send `Prefer: wait=10` and poll less."""
    return _read_job(services, job_id)


@router.post("/jobs/{job_id}/cancel", status_code=202, summary="Cancel a job", response_model=JobView, responses=problems(404, 409))
def cancel_job(job_id: str, services: ServicesDep, once: OnceDep) -> Response:
    """A waiting job is canceled at once; a running one writes its checkpoint and stops. Asking twice changes nothing."""
    with services.database.transaction() as session:
        return once.run(session, lambda: accepted_job(session, rows.request_cancel(session, job_id), services.settings))


@router.post("/jobs/{job_id}/retry", status_code=202, summary="Try a job again", response_model=JobView, responses=problems(404, 409))
def retry_job(job_id: str, services: ServicesDep, once: OnceDep) -> Response:
    """Queues a failed or canceled job again, with fresh attempts; it continues from its last checkpoint, and its failed run goes on.

    The other failed or canceled jobs of the same iteration are queued again with it: the run could not go on without them.
    """
    with services.database.transaction() as session:
        return once.run(session, lambda: accepted_job(session, _retry(session, job_id), services.settings))


def _retry(session: Session, job_id: str) -> Job:
    """Its iteration (or set) ends with any of its jobs, so all that came to nothing start again with it."""
    _refuse_without_targets(session, rows.get_job(session, job_id))
    companions = _companions(session, rows.get_job(session, job_id))
    job = rows.retry(session, job_id)
    for companion_id in companions:
        rows.retry(session, companion_id)
    if job.run_id is not None:
        # Whoever gives the run up because of this job does so before this, or looks at the job again afterwards.
        run = hold_run(session, job.run_id)
        if run.status == "canceled":
            raise WrongState(f"job {job_id} belongs to run {run.id}, which is canceled for good", status=run.status)
        if run.status in ("failed", "completed"):
            move_run(session, run.id, "active")
        phase = PHASE_OF_STEP.get(job.step or "", "training")
        over = Iteration.phase.in_(("failed", "canceled"))
        this = sa.update(Iteration).where(Iteration.run_id == job.run_id, Iteration.number == job.iteration, over)
        session.execute(this.values(phase=phase, finished_at=None))
    if job.pseudo_label_set_id is not None and job.kind in ("label", "select"):
        row = hold_set(session, job.pseudo_label_set_id)
        if row.status in ("failed", "canceled"):
            row.status, row.finished_at = PHASE_OF_STEP["label" if job.kind == "label" else "select"], None
    failed = sa.update(DatasetVersion).where(DatasetVersion.job_id == job_id, DatasetVersion.status == "failed")
    session.execute(failed.values(status="pending"))
    return job


def _refuse_without_targets(session: Session, job: Job) -> None:
    """WrongState when a dataset version that the job was to fill has been deleted."""
    if job.kind not in ("ingest", "split"):
        return
    wanted = {target["version_id"] for target in job.input.get("targets", {"all": job.input}).values()}
    gone = wanted - set(session.scalars(sa.select(DatasetVersion.id).where(DatasetVersion.id.in_(wanted))))
    if gone:
        raise WrongState(f"job {job.id} was to make dataset version {', '.join(sorted(gone))}, which was deleted; read the source anew")


def _companions(session: Session, job: Job) -> list[str]:
    """Ids of the other failed or canceled jobs of the same iteration, or of a set that belongs to no run."""
    if job.run_id is not None:
        together = sa.and_(Job.run_id == job.run_id, Job.iteration == job.iteration)
    elif job.pseudo_label_set_id is not None:
        together = sa.and_(Job.pseudo_label_set_id == job.pseudo_label_set_id, Job.run_id.is_(None))
    else:
        return []
    # Locked in one order and before the run: jobs before what they belong to, as everybody who writes both.
    query = sa.select(Job.id).where(together, Job.status.in_(("failed", "canceled"))).order_by(Job.id).with_for_update()
    return [job_id for job_id in session.scalars(query) if job_id != job.id]


@router.get("/jobs/{job_id}/logs", summary="Read an attempt's log", responses=problems(404))
def read_job_log(
    job_id: str, services: ServicesDep, attempt: Annotated[int | None, Query(ge=1, le=10**6, description="Default: the newest.")] = None
) -> LogView:
    """The last 64 KiB of what the attempt's process wrote to its standard error; empty when it wrote nothing."""
    # First: when the folder is gone already, the rows that are read next have what was stored before that.
    here = _list_logs(services.settings.attempts_directory / job_id)
    with services.database.reading() as session:
        num_attempts = rows.get_job(session, job_id).attempt
        attempts = sorted({*here, *_stored_logs(session, job_id)})
    number = attempt or max(attempts, default=num_attempts)
    if number not in attempts:
        if not 0 < number <= num_attempts:
            raise NotFound(f"job {job_id} has no log of attempt {attempt}" if attempt else f"job {job_id} has no log yet")
        return LogView(job_id=job_id, attempt=number, attempts=attempts, text="", truncated=False)
    # The folder of the host that runs the attempt is ahead of what was stored.
    tail = _tail(here[number]) if number in here else None
    if tail is None:
        # Another host's; or the job has ended since the listing, and its log was stored before its folder was removed.
        with services.database.reading() as session:
            digest = _stored_logs(session, job_id).get(number)
        if digest is not None:
            with services.files.reading(digest) as path:
                tail = _tail(path)
    if tail is None:
        raise NotFound("the log was just removed; ask again")
    return LogView(job_id=job_id, attempt=number, attempts=attempts, text=tail[0], truncated=tail[1])


_LOG_NAME = re.compile(r"attempt-(\d{1,6})\.log")


def _list_logs(folder: Path) -> dict[int, Path]:
    """Logs in the job's folder on this host, by attempt."""
    try:
        return {int(match[1]): path for path in folder.iterdir() if (match := _LOG_NAME.fullmatch(path.name))}
    except FileNotFoundError:
        return {}


def _stored_logs(session: Session, job_id: str) -> dict[int, str]:
    """Digests of the logs that were stored, by attempt."""
    return {int(match[1]): row.digest for row in list_files(session, job_id) if (match := _LOG_NAME.fullmatch(row.name))}


def _tail(path: Path) -> tuple[str, bool] | None:
    """The end, and whether there is more; None when the file has just been removed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_BYTES))
            return file.read().decode("utf-8", "replace"), size > LOG_BYTES
    except FileNotFoundError:
        return None


@router.get("/jobs/{job_id}/metrics", summary="Read a job's metric points", responses=problems(404))
def list_job_metrics(job_id: str, services: ServicesDep, after: After = None, limit: Limit = 200) -> EventPage:
    """Loss, accuracy, learning rate and throughput as they were reported, in order."""
    with services.database.reading() as session:
        return read_events(session, METRICS, job_id, after=after or 0, limit=limit)


@router.get("/jobs/{job_id}/events", summary="Follow a job", response_model=EventPage, responses={**problems(404), **STREAM})
async def follow_job(request: Request, job_id: str, services: ServicesDep, after: After = None, limit: Limit = 200) -> Response | EventPage:
    """With `Accept: text/event-stream` a live stream that ends with the event `end`; else a page.

    After a cut, send the last id you saw as `Last-Event-ID`: nothing is missing and nothing comes twice, on any replica.
    """
    return await answer_events(request, services.progress, JOB_EVENTS, job_id, after=after, limit=limit)
