"""What must happen once, not once a worker: relay hints, take back lost jobs, move iterations on, sweep. Held by a singleton lease."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.exc

from core.db.files import find_named_digests
from core.db.jobs import lose_expired
from core.db.session import Database, now
from core.db.tables import Generation, Job
from core.db.workers import forget_old_messages, hint_again, hold_singleton, list_unpublished, mark_published, release_singleton
from core.errors import ServiceError
from core.lifecycle import JOB_TERMINAL
from core.logs import get_log
from core.queue import Queue
from core.settings import Settings
from core.storage import Storage
from workers import controller

SINGLETON = "housekeeping"
SINGLETON_SECONDS = 6.0
RELAY_SECONDS = 0.15
HINT_AGAIN_SECONDS = 10.0
SWEEP_SECONDS = 60.0
KEEP_UNFINISHED_SECONDS = 7 * 24 * 3600.0
"""Checkpoints of failed and canceled jobs stay this long: a retry goes on from them."""
KEEP_MESSAGES_SECONDS = 3600.0
_BATCH = 200


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
        self._held_until = self._hinted_at = self._swept_at = float("-inf")

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
        """Whether this process keeps house for now; the lease is renewed when half of it is over, not at every turn."""
        moment = time.monotonic()
        if self._held_until - moment > SINGLETON_SECONDS / 2:
            return True
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

    def relay(self) -> None:
        """Publish what the outbox holds; what the broker does not take stays. Publishing twice is harmless."""
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
            if len(published) < _BATCH:
                return

    def hint_again(self) -> None:
        """Jobs that wait although their message went out: it may have been lost."""
        with self._database.transaction() as session:
            hint_again(session, older_than_seconds=HINT_AGAIN_SECONDS)

    def sweep(self) -> None:
        """Remove what nobody needs: unnamed files, folders of finished jobs, copies of deleted generations, old messages."""
        self.sweep_files()
        self.sweep_folders(self._settings.attempts_directory, self._finished_jobs)
        self.sweep_folders(self._settings.cache_directory / "generations", self._deleted_generations)
        with self._database.transaction() as session:
            forget_old_messages(session, older_than_seconds=KEEP_MESSAGES_SECONDS)

    def sweep_files(self) -> None:
        """Remove stored files that no row names and that are old enough not to be about to be named."""
        grace = self._settings.orphan_grace_seconds
        with self._database.reading() as session:
            # By the clock of all: a host whose own is an hour ahead would take for old what is about to be named.
            moment = now(session).timestamp()
        for digests in _in_batches(self._storage.list_old(older_than_seconds=grace, now_seconds=moment)):
            with self._database.reading() as session:
                named = find_named_digests(session, digests)
            for digest in set(digests) - named:
                self._storage.remove(digest, unless_touched_within_seconds=grace)
                get_log().info("storage.removed", digest=digest)

    def sweep_folders(self, directory: Path, find_unneeded: Callable[[list[str]], list[str]]) -> None:
        """Remove the folders, named by ids, that `find_unneeded` gives of a list of ids."""
        if not directory.is_dir():
            return
        for ids in _in_batches(path.name for path in directory.iterdir() if not path.name.startswith(".")):
            for name in find_unneeded(ids):
                shutil.rmtree(directory / name, ignore_errors=True)

    def _finished_jobs(self, ids: list[str]) -> list[str]:
        """Succeeded ones, and those that failed so long ago that nobody will retry them."""
        with self._database.reading() as session:
            rows = session.execute(sa.select(Job.id, Job.status, Job.finished_at).where(Job.id.in_(ids), Job.status.in_(JOB_TERMINAL)))
            moment = now(session)
            ages = [(job_id, status, (moment - finished).total_seconds()) for job_id, status, finished in rows if finished]
        keep = {"succeeded": SWEEP_SECONDS}
        return [job_id for job_id, status, age in ages if age > keep.get(status, KEEP_UNFINISHED_SECONDS)]

    def _deleted_generations(self, ids: list[str]) -> list[str]:
        with self._database.reading() as session:
            kept = set(session.scalars(sa.select(Generation.id).where(Generation.id.in_(ids))))
        return [name for name in ids if name not in kept]


def _in_batches(items: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
