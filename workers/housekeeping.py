"""What must happen once, not once a worker: relay hints, take back lost jobs, move iterations on, sweep. Held by a singleton lease."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.exc

from core.db.jobs import lose_expired
from core.db.runs import move_to_offered_devices
from core.db.session import Database, now
from core.db.tables import Generation, Job, Worker
from core.db.workers import forget_old_messages, hint_again, hold_singleton, is_held, list_unpublished, mark_published, release_singleton
from core.errors import ServiceError
from core.lifecycle import JOB_TERMINAL
from core.logs import get_log
from core.queue import Queue
from core.settings import Settings
from core.storage import Storage
from workers import controller, garbage
from workers.folders import left_alone

SINGLETON = "housekeeping"
SINGLETON_SECONDS = 6.0
ASK_SECONDS = 1.5
"""How often, on average, a worker that does not keep house looks whether it should: two hundred of them must not be a load."""
RELAY_SECONDS = 0.15
RELAY_TURN_SECONDS = 0.5
"""The rest of 30 000 hints goes out in the next turns: lost jobs, iterations and this process's own lease must not wait for it."""
HINT_AGAIN_SECONDS = 10.0
DEVICE_UNSEEN_SECONDS = 120.0
"""A run whose device is open waits this long for the one that it was to have: as long as a worker may need to be started again."""
SWEEP_SECONDS = 60.0
KEEP_MESSAGES_SECONDS = 3600.0
KEEP_SIGNS_SECONDS = 24 * 3600.0
_BATCH = 200
_REMOVED = ".removed-"
"""What the names of folders begin with that a sweep has begun to remove."""


class Housekeeping:
    """A thread that tries to be the one that keeps house, and does so while it is."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        queue: Queue,
        *,
        holder: str,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> None:
        """`on_crash` hears of the surprise that ended the thread."""
        self._settings = settings
        self._database = database
        self._storage = storage
        self._queue = queue
        self._holder = holder
        self._on_crash = on_crash
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        self._sweeper: threading.Thread | None = None
        self._ask_at = self._held_until = self._hinted_at = self._swept_at = self._files_swept_at = self._host_swept_at = float("-inf")

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End, and let the next one have the lease at once."""
        self._stopping.set()
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._database.transaction() as session:
                release_singleton(session, SINGLETON, holder=self._holder)
        except sqlalchemy.exc.SQLAlchemyError as error:
            get_log().warning("housekeeping.lease_kept", error=str(error).splitlines()[0])

    def follow(self, job: Job) -> None:
        """A job of this worker ended: move its run or set on right away, whoever keeps house; housekeeping catches what is missed here."""
        try:
            if job.run_id is not None:
                controller.advance_run(self._database, job.run_id)
            elif job.pseudo_label_set_id is not None:
                controller.advance_set(self._database, job.pseudo_label_set_id)
        except sqlalchemy.exc.SQLAlchemyError as error:
            get_log().warning("controller.later", job_id=job.id, error=str(error).splitlines()[0])
        self._bell.set()

    def _run(self) -> None:
        try:
            self._keep_on()
        except Exception as error:
            # A worker without housekeeping would look alive while nothing moves.
            if self._on_crash is not None:
                self._on_crash(error)
            raise

    def _keep_on(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._hold():
                    self.keep_house()
                elif not self._storage.is_local:
                    # Hosts that share no files each have folders of their own.
                    self._sweep_host_when_due()
                self._rest()
            except (sqlalchemy.exc.SQLAlchemyError, ServiceError, OSError) as error:
                get_log().warning("housekeeping.failed", error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
                self._stopping.wait(1.0)

    def _rest(self) -> None:
        """Wait for the next turn. With a broker, hints go out meanwhile: somebody waits for each of them."""
        end = time.monotonic() + self._settings.housekeeping_seconds
        relays = self._settings.redis_url is not None and self._held_until > time.monotonic()
        while (left := end - time.monotonic()) > 0 and not self._bell.wait(min(left, RELAY_SECONDS) if relays else left):
            if relays:
                self.relay()
        self._bell.clear()

    def _hold(self) -> bool:
        """Whether this process keeps house for now; the lease is renewed when half of it is over, not at every turn.

        Who does not have it looks now and then, whatever rings, and reads first: asking for it locks the row, even in vain.
        """
        moment = time.monotonic()
        if self._held_until - moment > SINGLETON_SECONDS / 2:
            return True
        if self._held_until < moment:
            if moment < self._ask_at:
                return False
            self._ask_at = moment + ASK_SECONDS * random.uniform(0.5, 1.5)
            with self._database.reading() as session:
                if is_held(session, SINGLETON, by_others_than=self._holder):
                    return False
        with self._database.transaction() as session:
            held = hold_singleton(session, SINGLETON, holder=self._holder, seconds=SINGLETON_SECONDS)
        self._held_until = moment + SINGLETON_SECONDS if held else float("-inf")
        return held

    def keep_house(self) -> None:
        """One turn; writes only what there is to write."""
        self.lose_jobs()
        controller.advance_all(self._database)
        moment = time.monotonic()
        if moment - self._hinted_at > HINT_AGAIN_SECONDS:
            self._hinted_at = moment
            self.move_jobs()
            self.hint_again()
        self.relay()
        if moment - self._swept_at > SWEEP_SECONDS:
            self._swept_at = moment
            self.sweep()

    def lose_jobs(self) -> None:
        """Queue again what silent workers held."""
        with self._database.reading() as session:
            expired = sa.select(Job.id).where(Job.status == "running", Job.lease_until < now(session)).limit(1)
            if session.scalar(expired) is None:
                return
        with self._database.transaction() as session:
            for job in lose_expired(session, backoff_seconds=self._settings.retry_backoff_seconds):
                get_log().warning("job.lost", job_id=job.id, status=job.status, lost_attempts=job.lost_attempts)

    def move_jobs(self) -> None:
        """Let jobs of runs that left their device open go where workers are."""
        moved = True
        while moved:
            with self._database.transaction() as session:
                jobs = move_to_offered_devices(session, unseen_seconds=DEVICE_UNSEEN_SECONDS, limit=_BATCH)
                moved = bool(jobs)
            for job in jobs:
                get_log().warning("job.moved", job_id=job.id, run_id=job.run_id, capability=job.capability)

    def relay(self) -> None:
        """Publish what the outbox holds, for a turn; what the broker does not take stays. Publishing twice is harmless."""
        end = time.monotonic() + RELAY_TURN_SECONDS
        while True:
            with self._database.reading() as session:
                messages = [(row.id, row.job_id, row.queue) for row in list_unpublished(session, limit=_BATCH)]
            published: list[int] = []
            for number, job_id, queue in messages:
                try:
                    self._queue.publish(job_id, capability=queue)
                except OSError as error:
                    get_log().warning("broker.away", error=str(error).splitlines()[0], waiting=len(messages) - len(published))
                    break
                published.append(number)
            if published:
                with self._database.transaction() as session:
                    mark_published(session, published)
            if len(published) < _BATCH or time.monotonic() >= end:
                return

    def hint_again(self) -> None:
        """Jobs that wait although their message went out: it may have been lost."""
        with self._database.transaction() as session:
            hint_again(session, older_than_seconds=HINT_AGAIN_SECONDS)

    def sweep(self) -> None:
        """Remove what nobody needs: unnamed files, what is old by the settings, folders of finished jobs, old messages and signs."""
        self.sweep_signs()
        with self._database.transaction() as session:
            forget_old_messages(session, older_than_seconds=KEEP_MESSAGES_SECONDS)
        garbage.forget_expired(self._database, self._settings, at_once=False)
        self._sweep_host_when_due()
        if self._storage.is_local:
            self.sweep_files()
        else:
            self._sweep_files_beside()

    def _sweep_files_beside(self) -> None:
        """A bucket takes long to list, and longer when it is away: jobs must not wait for that."""
        moment, pause = time.monotonic(), max(SWEEP_SECONDS, self._settings.orphan_grace_seconds / 4)
        if moment - self._files_swept_at < pause or (self._sweeper is not None and self._sweeper.is_alive()):
            return
        self._files_swept_at = moment
        self._sweeper = threading.Thread(target=self._try_to_sweep_files, name="sweeper", daemon=True)
        self._sweeper.start()

    def _try_to_sweep_files(self) -> None:
        try:
            self.sweep_files()
        except (sqlalchemy.exc.SQLAlchemyError, ServiceError) as error:
            get_log().warning("sweep.failed", error=f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def _sweep_host_when_due(self) -> None:
        moment = time.monotonic()
        if moment - self._host_swept_at < SWEEP_SECONDS / 2:
            return
        self._host_swept_at = moment
        self.sweep_folders(self._settings.attempts_directory, self._finished_jobs)
        self.sweep_folders(self._settings.cache_directory / "generations", self._deleted_generations)

    def sweep_files(self) -> None:
        """Remove stored files that no row names and that are old enough not to be about to be named."""
        garbage.sweep_files(self._database, self._storage, self._settings)

    def sweep_signs(self) -> None:
        """Remove the signs of life of workers that ended without a word, long ago."""
        directory = self._settings.workers_directory
        for ids in garbage.in_batches(path.stem for path in directory.glob("*.json")):
            with self._database.reading() as session:
                oldest = now(session) - timedelta(seconds=KEEP_SIGNS_SECONDS)
                kept = set(session.scalars(sa.select(Worker.id).where(Worker.id.in_(ids), Worker.seen_at >= oldest)))
            for worker_id in set(ids) - kept:
                (directory / f"{worker_id}.json").unlink(missing_ok=True)

    def sweep_folders(self, directory: Path, find_unneeded: Callable[[list[str]], list[str]]) -> None:
        """Remove the folders, named by ids, that `find_unneeded` gives of a list of ids."""
        if not directory.is_dir():
            return
        for left in directory.glob(f"{_REMOVED}*"):
            shutil.rmtree(left, ignore_errors=True)
        for ids in garbage.in_batches(path.name for path in directory.iterdir() if not path.name.startswith(".")):
            for name in find_unneeded(ids):
                aside = directory / f"{_REMOVED}{name}"
                with left_alone(directory / name) as alone:
                    # Asked again: a job may have been retried since, and goes on from what lies there.
                    if alone and find_unneeded([name]):
                        # At once, where removing takes its time: whoever begins now begins with an empty folder, not with half of one.
                        (directory / name).rename(aside)
                shutil.rmtree(aside, ignore_errors=True)

    def _finished_jobs(self, ids: list[str]) -> list[str]:
        """Succeeded ones, those that failed so long ago that nobody will retry them, and those that were deleted."""
        with self._database.reading() as session:
            rows = session.execute(sa.select(Job.id, Job.status, Job.finished_at).where(Job.id.in_(ids))).all()
            moment = now(session)
        gone = set(ids) - {job_id for job_id, _, _ in rows}
        ages = [(job_id, status, (moment - at).total_seconds()) for job_id, status, at in rows if status in JOB_TERMINAL and at]
        # A retry of a failed or canceled one goes on from what lies there.
        kept_seconds = self._settings.keep_checkpoints_days * 24 * 3600
        return [*gone, *(job_id for job_id, status, age in ages if age > (SWEEP_SECONDS if status == "succeeded" else kept_seconds))]

    def _deleted_generations(self, ids: list[str]) -> list[str]:
        with self._database.reading() as session:
            kept = set(session.scalars(sa.select(Generation.id).where(Generation.id.in_(ids))))
        return [name for name in ids if name not in kept]
