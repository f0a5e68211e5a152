"""How an attempt's end becomes rows: one transaction, held by the claim's token. Fenced means that nothing is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.datasets import SHARD, fail_version, finish_version, list_shards
from core.db.events import count_reports
from core.db.files import forget_files, name_files
from core.db.generations import register_generation
from core.db.pseudo_labels import finish_set
from core.db.reuse import Labeled, remember_shard
from core.db.tables import Iteration, Job, Run
from core.errors import NotFound, NotReady, ServiceError, StorageDamaged, StorageError, StorageFull
from core.storage import Storage
from workers.checkpoints import PREFIX
from workers.progress import Reports
from workers.reuse import Found, keys_of_result

Stored = dict[str, dict[str, Any]]
"""Name → {digest, num_bytes}."""


def store(storage: Storage, files: dict[str, str], *, within_seconds: float) -> Stored:
    """Put what the attempt made into storage; StorageError when that fails. Rows name the files later, or never.

    It may not take longer than `within_seconds`, after which the first of them might be swept away before it has a name.
    """
    started = time.monotonic()
    stored = {name: storage.put(Path(path)) for name, path in files.items()}
    if time.monotonic() - started > within_seconds:
        advice = "raise NOISY_STUDENT_ORPHAN_GRACE_SECONDS, or make less at once"
        raise StorageError(f"storing {len(files)} files took longer than {within_seconds:.0f} s; {advice}")
    return stored


def write_reports(session: Session, job: Job, reports: Reports, *, lease_seconds: float) -> Job | None:
    """Keep the lease and write what the attempt said; None when fenced."""
    kept = jobs.heartbeat(session, job.id, token=job.token, lease_seconds=lease_seconds, progress=reports.progress)
    if kept is None:
        return None
    if reports.num_doubtful:
        # A commit in doubt is over now: it held the row that was just updated.
        reports.find_out(count_reports(session, job.id, attempt=job.attempt))
    if reports.items:
        jobs.report(session, job.id, token=job.token, items=reports.items)
    if reports.phase is not None and job.step in ("train-teacher", "train-student"):
        jobs.set_phase(session, job, reports.phase)
    if reports.runtime is not None and job.run_id is not None:
        # The first job of a run decides for all of them.
        session.execute(sa.update(Run).where(Run.id == job.run_id, Run.runtime.is_(None)).values(runtime=reports.runtime))
    return kept


def record_success(session: Session, job: Job, made: dict[str, Any], files: Stored, log: Stored) -> Job | None:
    """Finish the job and register what it made; None when fenced."""
    held = jobs.hold(session, job.id, token=job.token)
    if held is None:
        return None
    name_files(session, job.id, log)
    forget_files(session, job.id, prefix=PREFIX)
    if job.kind == "ingest":
        manifest = made["manifest"] | files["manifest.parquet"]
        shards = {name: facts for name, facts in files.items() if name.startswith(SHARD)}
        finish_version(session, job.input["version_id"], manifest=manifest, report=made["report"], shards=shards)
    elif job.kind == "split":
        # Each part names them too: it needs them whatever becomes of the whole.
        shards = list_shards(session, job.input["source_version_id"])
        for part, target in job.input["targets"].items():
            manifest = made["parts"][part]["manifest"] | files[f"{part}.parquet"]
            finish_version(session, target["version_id"], manifest=manifest, report=made["parts"][part]["report"], shards=shards)
    elif job.kind in ("train", "import"):
        register_generation(session, held, made | {"files": files})
        _tell_iteration(session, held)
    elif job.kind == "select":
        assert job.pseudo_label_set_id is not None
        finish_set(session, job.pseudo_label_set_id, files=files, report=made["report"])
    else:
        name_files(session, job.id, files)
    if job.kind == "label":
        remember_shard(session, job.id, keys_of_result(session, job, made))
    return jobs.succeed(session, job.id, token=job.token, result=_summary(job, made))


def record_reuse(session: Session, job: Job, found: Found, shard: Labeled, files: Stored, *, lease_seconds: float) -> Job | None:
    """Finish a labeling job with the shard that another job labeled; None when fenced."""
    reports = Reports()
    reports.runtime = found.runtime
    reports.items.append(("reused", {"job_id": shard.job_id, "digest": shard.digest}))
    if write_reports(session, job, reports, lease_seconds=lease_seconds) is None:
        return None
    made = shard.result | {"skipped": True, "seconds": 0.0, "images_per_second": 0.0, "reused_from": shard.job_id}
    return record_success(session, job, made, files, {})


def _summary(job: Job, made: dict[str, Any]) -> dict[str, Any]:
    """What the job's row keeps of its result; the rest stands in the row that it made."""
    if job.kind in ("train", "import"):
        measured = {split: made["metrics"].get(split) for split in ("validation", "test")}
        top1 = {f"{split}_top1": found["top1"] for split, found in measured.items() if found}
        return {"generation_id": job.generation_id, **top1}
    if job.kind == "split":
        return {"parts": {part: found["manifest"] for part, found in made["parts"].items()}}
    if job.kind == "ingest":
        return {"version_id": job.input["version_id"], **made["manifest"]}
    if job.kind == "select":
        return {"pseudo_label_set_id": job.pseudo_label_set_id} | {name: made["report"].get(name) for name in ("num_unique", "num_rows")}
    return made


def _tell_iteration(session: Session, job: Job) -> None:
    if job.run_id is None:
        return
    column = "control_generation_id" if job.step == "train-control" else "generation_id"
    query = sa.update(Iteration).where(Iteration.run_id == job.run_id, Iteration.number == job.iteration)
    session.execute(query.values(**{column: job.generation_id}))
    unfinished = sa.exists().where(
        Job.run_id == job.run_id, Job.iteration == job.iteration, Job.step == "train-control", Job.status != "succeeded"
    )
    if job.step == "train-student" and session.scalar(sa.select(unfinished)):
        # The student is exported, its control is still in training.
        jobs.set_phase(session, job, "training")


def record_failure(session: Session, job: Job, error: dict[str, Any], log: Stored, *, backoff_seconds: float) -> Job | None:
    """End the attempt with its error: queued again or failed; None when fenced."""
    ended = jobs.fail(session, job.id, token=job.token, error=error, backoff_seconds=backoff_seconds)
    if ended is not None:
        name_files(session, job.id, log)
        _give_up_versions(session, ended)
    return ended


def _give_up_versions(session: Session, job: Job) -> None:
    """The dataset versions that this job was to fill will not come."""
    if job.status in ("failed", "canceled") and job.kind in ("ingest", "split"):
        targets = job.input.get("targets", {"all": job.input}).values()
        for target in targets:
            fail_version(session, target["version_id"])


def record_interruption(session: Session, job: Job, log: Stored, *, reason: str, pause_seconds: float = 0) -> Job | None:
    """The attempt stopped because it was asked to: canceled when somebody wished that, else queued again at no cost. None when fenced."""
    ended = jobs.interrupt(session, job.id, token=job.token, reason=reason, pause_seconds=pause_seconds)
    if ended is not None:
        name_files(session, job.id, log)
        _give_up_versions(session, ended)
    return ended


def describe_refusal(error: ServiceError) -> dict[str, Any]:
    """A refusal before the attempt began, as the job's row keeps it."""
    kind, code = "permanent", "input.refused"
    if isinstance(error, StorageFull):
        kind, code = "retryable", "storage.full"
    elif isinstance(error, StorageDamaged):
        code = "storage.damaged"
    elif isinstance(error, StorageError):
        kind, code = "retryable", "storage.unavailable"
    elif isinstance(error, NotFound):
        code = "input.missing"
    elif isinstance(error, NotReady):
        code = "input.not_ready"
    return {"class": kind, "code": code, "message": error.message, "details": error.details}
