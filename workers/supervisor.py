"""The thin, long-lived part of a worker: slots, hints, and a row that says that it is alive. Never imports torch, numpy or the web."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections import deque
from collections.abc import Callable

import sqlalchemy as sa

from core.db.jobs import release_dead_holder
from core.db.session import AWAY, Database
from core.db.tables import Job, Worker
from core.db.workers import WorkerDescription, is_draining, register_worker, release_singleton, see_worker
from core.logs import get_log
from core.settings import Settings
from core.storage import Storage
from workers.announcement import describe_worker
from workers.health import SignOfLife
from workers.inputs import Inputs
from workers.processes import start_ticks
from workers.reuse import Reuse
from workers.slots import Slot

SEEN_SECONDS = 15.0
HAND_ON_SECONDS = 2.0
"""How long a hint waits for a free slot before it goes back to the queue, for another worker."""


def make_name(settings: Settings) -> str:
    """Names this process for good: id and start together are never given twice on one boot."""
    return f"{settings.worker_name or socket.gethostname()}:{os.getpid()}:{start_ticks(os.getpid())}"


class Supervisor:
    """Runs attempts in `settings.slots` slots until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        *,
        name: str | None = None,
        capabilities: tuple[str, ...] | None = None,
        on_job_ended: Callable[[Job], None] | None = None,
        on_crash: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.database = database
        self.storage = storage
        self.capabilities = capabilities or settings.capabilities
        self.name = name or make_name(settings)
        self.inputs = Inputs(database, storage, settings, capabilities=self.capabilities)
        self.reuse = Reuse(database, capabilities=self.capabilities)
        self.stopping = threading.Event()
        self.crashed = threading.Event()
        self._on_job_ended = on_job_ended
        self._on_crash = on_crash
        self._worker_id: str | None = None
        self._sign: SignOfLife | None = None
        self._hints: deque[str | None] = deque()
        self._idle = 0
        self._bell = threading.Condition()
        self._slots = [Slot(self, number) for number in range(settings.slots)]
        self._seer = threading.Thread(target=self._keep_seen, name="seen", daemon=True)

    def start(self) -> None:
        """Say hello, give back what dead predecessors of this host held, and begin to claim."""
        description = describe_worker(self.name, capabilities=self.capabilities, slots=self.settings.slots)
        with self.database.transaction() as session:
            self._worker_id = register_worker(session, description).id
        self._sign = SignOfLife(self.settings.workers_directory, self._worker_id)
        self._show_sign(self._sign.begin)
        self._bury_predecessors(description)
        for thread in (*self._slots, self._seer):
            thread.start()
        log = get_log().bind(worker=self.name, worker_id=self._worker_id, code_digest=description.code_digest)
        log.info("worker.started", capabilities=self.capabilities, slots=self.settings.slots)

    def stop(self) -> None:
        """Interrupt every attempt (a checkpoint each, no attempt lost), say good-bye. Returns when all of that is written."""
        self.ask_to_stop()
        for slot in self._slots:
            if slot.is_alive():
                slot.join()
        if self._worker_id is not None:
            try:
                with self.database.transaction() as session:
                    see_worker(session, self._worker_id, stopped=True)
            except AWAY as error:
                get_log().warning("database.away", doing="stop", error=str(error).splitlines()[0])
        if self._sign is not None:
            self._show_sign(self._sign.end)
        get_log().info("worker.stopped", worker=self.name)

    def ask_to_stop(self) -> None:
        """Begin to stop, without waiting."""
        self.stopping.set()
        with self._bell:
            self._bell.notify_all()

    def wake(self, job_id: str, *, wait_seconds: float = HAND_ON_SECONDS) -> bool:
        """Tell an idle slot that this job waits; False when no slot became idle in time."""
        with self._bell:
            self._bell.wait_for(lambda: self.stopping.is_set() or self._idle > len(self._hints), timeout=wait_seconds)
            if self.stopping.is_set() or self._idle <= len(self._hints):
                return False
            self._hints.append(job_id)
            self._bell.notify_all()
            return True

    def drains(self) -> bool:
        """Whether somebody asked this worker to finish what it has and to claim nothing more. The claim itself asks again."""
        try:
            with self.database.reading() as session:
                return self._worker_id is not None and is_draining(session, self._worker_id)
        except AWAY as error:
            get_log().warning("database.away", doing="hint", error=str(error).splitlines()[0])
            return False

    def num_idle_slots(self) -> int:
        """Slots that wait for a hint."""
        with self._bell:
            return self._idle

    def find_waiting(self, job_id: str) -> str | None:
        """The capability that the job still waits for; None when somebody took it."""
        with self.database.reading() as session:
            return session.scalar(sa.select(Job.capability).where(Job.id == job_id, Job.status == "queued"))

    def take_hint(self) -> str | None:
        """The job that somebody spoke of last, if any."""
        with self._bell:
            return self._hints.popleft() if self._hints else None

    def wait_for_hint(self) -> None:
        """Sleep until a hint comes or it is time to look by oneself. Idle slots do not all look at the same moment."""
        pause = self.settings.resolved_poll_seconds * random.uniform(0.75, 1.0)
        with self._bell:
            self._idle += 1
            self._bell.notify_all()
            self._bell.wait_for(lambda: self.stopping.is_set() or bool(self._hints), timeout=pause)
            self._idle -= 1

    def job_ended(self, job: Job) -> None:
        """A slot's attempt ended: what follows from it need not wait for housekeeping, nor the other slots for their next look."""
        if self._on_job_ended is not None:
            self._on_job_ended(job)
        with self._bell:
            self._hints.extend([None] * (self._idle - len(self._hints)))
            self._bell.notify_all()

    def report_crash(self, error: Exception) -> None:
        """A slot cannot go on: the process must end, so that a fresh one takes over."""
        get_log().error("worker.crashed", worker=self.name, error=repr(error))
        self.crashed.set()
        self.ask_to_stop()
        if self._on_crash is not None:
            self._on_crash()

    def _bury_predecessors(self, own: WorkerDescription) -> None:
        """Release at once what workers of this boot held whose process is gone, instead of waiting for their leases."""
        with self.database.reading() as session:
            same = sa.select(Worker).where(Worker.host == own.host, Worker.boot_id == own.boot_id, Worker.stopped_at.is_(None))
            dead = [worker.name for worker in session.scalars(same) if worker.name != own.name and not _lives(worker)]
        for name in dead:
            with self.database.transaction() as session:
                released = release_dead_holder(session, name)
                release_singleton(session, "housekeeping", holder=name)
            get_log().info("worker.predecessor_dead", predecessor=name, jobs=[job.id for job in released])

    def _keep_seen(self) -> None:
        while not self.stopping.wait(SEEN_SECONDS):
            try:
                with self.database.transaction() as session:
                    assert self._worker_id is not None
                    see_worker(session, self._worker_id)
            except AWAY as error:
                get_log().warning("database.away", doing="seen", error=str(error).splitlines()[0])
            if self._sign is not None:
                # After the database: a thread that hangs in a dead connection must not look alive.
                self._show_sign(self._sign.renew)

    def _show_sign(self, show: Callable[[], None]) -> None:
        try:
            show()
        except OSError as error:
            get_log().warning("worker.sign_not_written", error=str(error))


def _lives(worker: Worker) -> bool:
    """Whether the process that wrote this row is still there: the name ends with its start, so a reused id does not count."""
    return str(start_ticks(worker.pid)) == worker.name.rpartition(":")[2]
