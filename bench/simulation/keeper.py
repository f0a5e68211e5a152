"""Housekeeping as every worker has it, with a clock at each part of its turn; and the process that keeps house for the fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.simulation.plan import Notes, Shared
from core.db.session import Database
from core.db.tables import Job
from core.queue import Queue, make_queue
from core.settings import Settings
from core.storage import make_storage
from workers.housekeeping import Housekeeping


class TimedHousekeeping(Housekeeping):
    """The service's own; only the time is noted."""

    def __init__(self, settings: Settings, database: Database, queue: Queue, notes: Notes, *, holder: str) -> None:
        super().__init__(settings, database, make_storage(settings), queue, holder=holder, on_crash=self._note_crash)
        self._notes = notes

    def _note_crash(self, error: Exception) -> None:
        self._notes.errors.append(f"housekeeping ended: {error!r}")

    def _part(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        with self._notes.timed(name):
            work(*arguments)

    def follow(self, job: Job) -> None:
        self._part("follow", super().follow, job)

    def keep_house(self) -> None:
        self._part("turn", super().keep_house)

    def lose_jobs(self) -> None:
        self._part("lose jobs", super().lose_jobs)

    def move_jobs(self) -> None:
        self._part("move jobs", super().move_jobs)

    def hint_again(self) -> None:
        self._part("hint again", super().hint_again)

    def relay(self) -> None:
        self._part("relay", super().relay)

    def sweep(self) -> None:
        self._part("sweep", super().sweep)


def keep(shared: Shared) -> None:
    """A process of its own, so that what it notes is not its neighbors' time. It comes first, so it has the lease."""
    notes = Notes()
    database = Database(shared.settings.resolved_database_url)
    keeper = TimedHousekeeping(shared.settings, database, make_queue(shared.settings.redis_url), notes, holder="keeper")
    keeper.start()
    with shared.ready.get_lock():
        shared.ready.value += 1
    shared.stop.wait()
    keeper.stop()
    database.close()
    notes.write(shared.directory / "keeper.notes.json")
