"""A full worker: supervisor and housekeeping on one database and one storage. `python -m workers` and Celery's app both start this."""

from __future__ import annotations

from collections.abc import Callable

from core.db.schema import check_schema
from core.db.session import Database
from core.queue import make_queue
from core.settings import Settings
from core.storage import make_storage
from workers.housekeeping import Housekeeping
from workers.supervisor import Supervisor, make_name


class FullWorker:
    """Opened once a process."""

    def __init__(
        self, settings: Settings, *, capabilities: tuple[str, ...] | None = None, on_crash: Callable[[], None] | None = None
    ) -> None:
        """SchemaMismatch when the database is not the code's. `on_crash` must bring the process to call `stop`."""
        self.database = Database(settings.resolved_database_url)
        check_schema(self.database)
        storage, name = make_storage(settings), make_name(settings)
        queue = make_queue(settings.redis_url)
        self.housekeeping = Housekeeping(settings, self.database, storage, queue, holder=name, on_crash=self._report_crash)
        self.supervisor = Supervisor(
            settings,
            self.database,
            storage,
            name=name,
            capabilities=capabilities,
            on_job_ended=self.housekeeping.follow,
            on_crash=on_crash,
        )

    def start(self) -> None:
        """Begin to work, in threads."""
        self.supervisor.start()
        self.housekeeping.start()

    def _report_crash(self, error: Exception) -> None:
        self.supervisor.report_crash(error)

    def stop(self) -> None:
        """Interrupt, hand over, say good-bye. Returns when that is written."""
        self.supervisor.ask_to_stop()
        self.housekeeping.stop()
        self.supervisor.stop()
        self.database.close()
