"""A slot: one thread that claims one job after another and watches over the attempt's process."""

from __future__ import annotations

import math
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db import jobs
from core.db.session import AWAY, Database
from core.db.tables import Job
from core.errors import ServiceError, StorageError
from core.logs import get_log
from workers import outcomes, reuse
from workers.beside import Beside
from workers.checkpoints import CheckpointKeeper
from workers.child import Child
from workers.processes import count_oom_kills
from workers.progress import FLUSH_SECONDS, Reports

if TYPE_CHECKING:
    from workers.supervisor import Supervisor

T = TypeVar("T")

FINAL = ("result", "error", "interrupted")
_SURPRISE = {"class": "permanent", "code": "attempt.surprise", "message": "the worker could not make sense of this job; its log says why"}
_NAMED_WITHIN = 0.75
"""Of the time for which a file without a name is kept: what an attempt made must be stored by then."""
_LISTEN_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 5.0


@dataclass(slots=True)
class Watch:
    """One attempt while it runs."""

    job: Job
    child: Child
    keeper: CheckpointKeeper | None = None
    """None where checkpoints lie in storage's own file system anyway."""
    asked_runtime: dict[str, Any] | None = None
    """What the attempt was told to run on, before it was resolved."""
    reports: Reports = field(default_factory=Reports)
    looked_at: float = field(default_factory=time.monotonic)
    beat_at: float = field(default_factory=time.monotonic)
    stop_reason: str | None = None
    """Why it was asked to stop; None while nobody wants that."""
    stop_at: float = 0.0
    fenced: bool = False
    oom_kills: tuple[int, int] = field(default_factory=lambda: (count_oom_kills(),) * 2)
    """The kernel's count at the last two looks, a second apart."""

    def describe_death(self, how: str) -> dict[str, Any]:
        """The error of an attempt whose process is gone: out of memory when the kernel just says so and less may do, else lost."""
        can_take_less = self.job.kind in ("train", "label")
        if "SIGKILL" in how and can_take_less and count_oom_kills() > self.oom_kills[0]:
            message = "the kernel killed the attempt's process because memory ran out; a smaller micro-batch may help"
            return self.describe_loss("memory.exhausted", message) | {"class": "resource"}
        return self.describe_loss("attempt.lost", f"the attempt's process {how}")

    def describe_loss(self, code: str, message: str) -> dict[str, Any]:
        """The error of an attempt that could not say itself what befell it, with the step where it was heard last."""
        step = self.reports.step
        return {"class": "retryable", "code": code, "message": message} | ({} if step is None else {"step": step})


class Slot(threading.Thread):
    """Runs attempts one at a time. The process of a labeled shard is kept for the next shard of the same set."""

    def __init__(self, supervisor: Supervisor, number: int) -> None:
        super().__init__(name=f"slot-{number}", daemon=True)
        self._supervisor = supervisor
        self._settings = supervisor.settings
        self._database: Database = supervisor.database
        self._child: Child | None = None

    def run(self) -> None:
        """Claim and run until the supervisor stops. A surprise ends the worker: whoever started it starts a fresh one."""
        try:
            while not self._supervisor.stopping.is_set():
                job = self._claim(job_id=self._supervisor.take_hint())
                if job is None:
                    self._supervisor.wait_for_hint()
                while job is not None:
                    job = self._run_job(job)
        except Exception as error:
            self._supervisor.report_crash(error)
            raise
        finally:
            self._drop_child()

    def _claim(self, *, job_id: str | None = None, set_id: str | None = None) -> Job | None:
        """A job for this slot; None when there is none, or when the database is away (then it pauses)."""
        supervisor = self._supervisor
        try:
            with self._database.transaction() as session:
                held: dict[str, Any] = {
                    "holder": supervisor.name,
                    "capabilities": supervisor.capabilities,
                    "lease_seconds": self._settings.lease_seconds,
                    "max_attempts": self._settings.max_attempts,
                }
                if set_id is not None:
                    return jobs.claim(session, **held, pseudo_label_set_id=set_id)
                # Priority decides, not whose hint came first. Only when nothing else is there is the hinted job waited for.
                found = jobs.claim(session, **held)
                return found or (jobs.claim(session, **held, job_id=job_id) if job_id else None)
        except AWAY as error:
            get_log().warning("database.away", doing="claim", error=str(error).splitlines()[0])
            supervisor.stopping.wait(random.uniform(0.5, 1.5))
            return None

    def _run_job(self, job: Job) -> Job | None:
        """Run one attempt to its end; returns the next shard of the same set when there is one."""
        log = get_log().bind(job_id=job.id, kind=job.kind, attempt=job.attempt)
        log.info("attempt.started", token=job.token)
        watch = None
        try:
            taken, ended = self._take_over(job)
            request = None if taken else self._prepare(job)
            if taken:
                done = ended is not None
            elif request is None:
                ended, done = self._give_back(job), False
            else:
                child = self._child or Child(self._supervisor.inputs.access(job))
                watch = Watch(job, child, self._make_keeper(job), asked_runtime=request["input"].get("runtime"))
                self._child = None
                watch.child.send(request)
                ended, done = self._follow(watch)
        except ServiceError as error:
            ended, done = self._fail(job, outcomes.describe_refusal(error), watch), False
        except AWAY as error:
            # Nothing was begun, or nothing can be told: the lease runs out and another attempt is made.
            log.warning("database.away", doing="attempt", error=str(error).splitlines()[0])
            ended, done = None, False
        except Exception:  # the supervisor's side of an attempt's outermost frame: one odd job must not end the worker
            log.exception("attempt.surprise")
            # Nothing but the job itself is written: whatever else belongs to it may be what the surprise comes from.
            ended, done = (
                self._settle(lambda session: jobs.fail(session, job.id, token=job.token, error=_SURPRISE, backoff_seconds=0)),
                False,
            )
        keep = done and job.kind == "label" and job.pseudo_label_set_id is not None
        if watch is not None and keep:
            self._child = watch.child
        elif watch is not None:
            watch.child.kill()
        if watch is not None and watch.keeper is not None:
            watch.keeper.abandon()
        log.info("attempt.ended", status=ended.status if ended else "fenced")
        if ended is not None and ended.status == "succeeded":
            shutil.rmtree(self._supervisor.inputs.directory(job.id), ignore_errors=True)
        else:
            self._supervisor.inputs.drop_files(job)
        self._supervisor.job_ended(job)
        following = self._claim(set_id=job.pseudo_label_set_id) if keep and not self._supervisor.stopping.is_set() else None
        if following is None:
            self._drop_child()
        return following

    def _drop_child(self) -> None:
        # It waits for work and has nothing to lose; an orderly exit of torch would take seconds.
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _follow(self, watch: Watch) -> tuple[Job | None, bool]:
        """Listen until the attempt ends, and write how: (the job's row, None when fenced; whether the process can take more)."""
        while True:
            message = watch.child.next_message(_LISTEN_SECONDS)
            if message is not None and message["type"] in FINAL:
                return self._finish(watch, message)
            if message is not None:
                watch.reports.take(message)
                if watch.keeper is not None and message.get("kind") == "checkpoint":
                    watch.keeper.note()
            elif watch.child.is_gone:
                how = watch.child.kill()
                if watch.stop_reason is not None:
                    return self._interrupt(watch), False
                return self._fail(watch.job, watch.describe_death(how), watch), False
            ended = self._tend(watch)
            if watch.fenced or ended is not None:
                watch.child.kill()
                return ended, False

    def _tend(self, watch: Watch) -> Job | None:
        """Between two lines: write, keep the lease, stop or give up on the attempt. Returns the row when that ended it."""
        now = time.monotonic()
        silent = now - watch.reports.heard_at
        if silent > self._settings.stall_seconds:
            watch.child.kill()
            message = f"the attempt was silent for {silent:.0f} seconds and was taken for hung"
            return self._fail(watch.job, watch.describe_loss("attempt.stalled", message), watch)
        if now - watch.looked_at >= min(FLUSH_SECONDS, self._settings.lease_seconds / 4):
            watch.looked_at = now
            self._look(watch, now)
        if watch.fenced:
            get_log().warning("attempt.fenced", job_id=watch.job.id, token=watch.job.token)
            return None
        if watch.stop_reason is None and self._supervisor.stopping.is_set():
            self._ask_to_stop(watch, "worker.stopped")
        if watch.stop_reason is not None and now > watch.stop_at + self._settings.grace_seconds:
            watch.child.kill()
            return self._interrupt(watch)
        return None

    def _look(self, watch: Watch, now: float) -> None:
        """Once a second: write what was said, or keep the lease when it is time, or just read whether the job is still ours and wanted."""
        watch.oom_kills = watch.oom_kills[1], count_oom_kills()
        try:
            beat = now - watch.beat_at >= self._settings.lease_seconds / 4
            if beat or not watch.reports.is_empty():
                with self._database.transaction() as session:
                    row = outcomes.write_reports(session, watch.job, watch.reports, lease_seconds=self._settings.lease_seconds)
                watch.reports.written()
                watch.beat_at = now
            else:
                with self._database.reading() as session:
                    held = sa.select(Job).where(Job.id == watch.job.id, Job.token == watch.job.token, Job.status == "running")
                    row = session.scalar(held)
        except AWAY as error:
            # The attempt goes on: if the lease runs out meanwhile, the token decides.
            watch.reports.doubt()
            get_log().warning("database.away", doing="heartbeat", job_id=watch.job.id, error=str(error).splitlines()[0])
            return
        watch.fenced = row is None
        if row is not None and row.cancel_requested_at is not None and watch.stop_reason is None:
            self._ask_to_stop(watch, "canceled")

    def _ask_to_stop(self, watch: Watch, reason: str) -> None:
        watch.stop_reason, watch.stop_at = reason, time.monotonic()
        watch.child.ask_to_stop()

    def _finish(self, watch: Watch, message: dict[str, Any]) -> tuple[Job | None, bool]:
        """The attempt said its last line."""
        if message["type"] == "interrupted":
            if "reason" not in message:
                return self._interrupt(watch), False
            get_log().warning(message["reason"], job_id=watch.job.id, message=message["message"])
            # Whoever is in the way looks at its lease within that time, if it goes on at all.
            return self._interrupt(watch, reason=message["reason"], pause_seconds=self._settings.lease_seconds), False
        if message["type"] == "error":
            return self._fail(watch.job, message["error"], watch), False
        job, storage = watch.job, self._supervisor.storage
        if watch.asked_runtime is not None:
            self._supervisor.reuse.note(watch.asked_runtime, message["result"].get("runtime"))
        try:
            within = self._settings.orphan_grace_seconds * _NAMED_WITHIN or math.inf
            files = self._beside(job, lambda _: outcomes.store(storage, message["files"], within_seconds=within), patient=True)
        except StorageError as error:
            return self._fail(job, outcomes.describe_refusal(error), watch), False
        if files is None:
            return self._interrupt(watch), False
        log = self._store_log(job)

        def write(session: Session) -> Job | None:
            kept = outcomes.write_reports(session, job, watch.reports, lease_seconds=self._settings.lease_seconds)
            return None if kept is None else outcomes.record_success(session, job, message["result"], files, log)

        return self._settle(write), watch.stop_reason is None

    def _fail(self, job: Job, error: dict[str, Any], watch: Watch | None) -> Job | None:
        self._keep_checkpoint(job, watch)
        log, backoff = self._store_log(job), self._settings.retry_backoff_seconds

        def write(session: Session) -> Job | None:
            if watch is not None:
                outcomes.write_reports(session, job, watch.reports, lease_seconds=self._settings.lease_seconds)
            return outcomes.record_failure(session, job, error, log, backoff_seconds=backoff)

        get_log().warning("attempt.failed", job_id=job.id, error_class=error["class"], code=error["code"], message=error["message"])
        return self._settle(write)

    def _interrupt(self, watch: Watch, *, reason: str = "attempt.stopped", pause_seconds: float = 0) -> Job | None:
        self._keep_checkpoint(watch.job, watch)
        job, log = watch.job, self._store_log(watch.job)

        def write(session: Session) -> Job | None:
            if outcomes.write_reports(session, job, watch.reports, lease_seconds=self._settings.lease_seconds) is None:
                return None
            return outcomes.record_interruption(session, job, log, reason=watch.stop_reason or reason, pause_seconds=pause_seconds)

        return self._settle(write)

    def _prepare(self, job: Job) -> dict[str, Any] | None:
        """What the child is to be told; None when the job was taken away, canceled or must wait for another worker meanwhile."""
        return self._beside(job, lambda abandoned: self._supervisor.inputs.request(job, abandoned), patient=False)

    def _take_over(self, job: Job) -> tuple[bool, Job | None]:
        """Finish the job with labels that were made before: (False, None) when it must be labeled, (True, None) when fenced."""
        found = self._supervisor.reuse.find(job) if self._settings.reuse_labels else None
        if found is None:
            return False, None
        storage, directory = self._supervisor.storage, self._supervisor.inputs.directory(job.id)
        if not found.is_same:
            self._beside(job, lambda abandoned: reuse.lay_out(storage, found, directory, job.attempt, abandoned), patient=False)
            return False, None
        kept = self._beside(job, lambda _: reuse.keep(storage, found), patient=False)
        if kept is None:
            return False, None
        lease = self._settings.lease_seconds
        return True, self._settle(lambda session: outcomes.record_reuse(session, job, found, *kept, lease_seconds=lease))

    def _give_back(self, job: Job) -> Job | None:
        return self._settle(lambda session: outcomes.record_interruption(session, job, {}, reason="worker.stopped"))

    def _make_keeper(self, job: Job) -> CheckpointKeeper | None:
        if self._supervisor.storage.is_local or job.kind != "train":
            return None
        return CheckpointKeeper(self._database, self._supervisor.storage, job, self._supervisor.inputs.directory(job.id))

    def _keep_checkpoint(self, job: Job, watch: Watch | None) -> None:
        """Another host may go on from what this attempt wrote last."""
        if watch is not None and watch.keeper is not None:
            keeper = watch.keeper
            self._beside(job, lambda _: keeper.finish(), patient=True)

    def _beside(self, job: Job, doing: Callable[[threading.Event], T], *, patient: bool) -> T | None:
        """Let storage take its time while the lease is kept; raises what `doing` raises.

        None when the job is not this worker's any more, or the worker must end: at once or, when `patient`, after the grace period; or when
        somebody wished it canceled, unless `patient`. What was begun then ends by itself, abandoned, and nobody looks at it.
        """
        if self._supervisor.storage.is_local:
            return doing(threading.Event())
        work = Beside(doing)
        beat_at = time.monotonic()
        stop_at: float | None = None
        try:
            while not work.wait(_LISTEN_SECONDS):
                now = time.monotonic()
                if self._supervisor.stopping.is_set():
                    stop_at = stop_at or now + (self._settings.grace_seconds if patient else 0)
                if stop_at is not None and now >= stop_at:
                    return None
                if now - beat_at >= min(FLUSH_SECONDS, self._settings.lease_seconds / 4):
                    beat_at = now
                    if not self._still_ours(job, patient=patient):
                        return None
            return work.result()
        finally:
            work.abandoned.set()

    def _still_ours(self, job: Job, *, patient: bool) -> bool:
        try:
            with self._database.transaction() as session:
                row = jobs.heartbeat(session, job.id, token=job.token, lease_seconds=self._settings.lease_seconds, progress=None)
        except AWAY as error:
            get_log().warning("database.away", doing="heartbeat", job_id=job.id, error=str(error).splitlines()[0])
            return True
        return row is not None and (patient or row.cancel_requested_at is None)

    def _store_log(self, job: Job) -> outcomes.Stored:
        """Keep the attempt's log where every host finds it; without one, nothing."""
        path, storage = self._supervisor.inputs.directory(job.id) / f"attempt-{job.attempt}.log", self._supervisor.storage
        try:
            empty = not path.stat().st_size
        except FileNotFoundError:
            # Also when a fenced attempt's successor has succeeded, and with it the folder has gone.
            return {}
        if empty:
            return {}
        try:
            kept = self._beside(job, lambda _: storage.put(path), patient=True)
            return {} if kept is None else {path.name: kept}
        except StorageError as error:
            get_log().warning("attempt.log_lost", job_id=job.id, error=error.message)
            return {}

    def _settle(self, write: Callable[[Session], T]) -> T | None:
        """Write an attempt's end, as often as it takes while the database is away; None also when the worker must end meanwhile."""
        pause, deadline = 0.2, None
        while True:
            try:
                with self._database.transaction() as session:
                    return write(session)
            except AWAY as error:
                get_log().warning("database.away", doing="settle", error=str(error).splitlines()[0])
            if self._supervisor.stopping.is_set():
                deadline = deadline or time.monotonic() + self._settings.grace_seconds
                if time.monotonic() > deadline:
                    return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
