"""What this process serves: the predictor's generations come from rows and stored files, its aliases follow the alias rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from core.db.files import list_files
from core.db.generations import get_generation
from core.db.promotions import get_alias
from core.db.session import Database
from core.errors import NotFound, StorageError
from core.settings import Settings
from core.storage import Storage
from ml.cores import num_cores
from server.following import Following
from server.metrics import Metrics
from server.predictor import FILES, Predictor, ServedGeneration
from server.stored_files import StoredFiles
from server.watchdog import Watchdog


class Serving:
    """The predictor, what keeps it with the alias rows, and what notices when it hangs."""

    def __init__(
        self, settings: Settings, database: Database, storage: Storage, files: StoredFiles, metrics: Metrics, *, answers: bool
    ) -> None:
        """Where `answers` is off, generations are only loaded and warmed before a promotion, and no alias is followed."""
        self._database = database
        self._storage = storage
        self._files = files
        self.answers = answers
        self.predictor = Predictor(
            self._predictor_files,
            # One more than cores: now and then each waits for the interpreter.
            num_threads=settings.predict_threads or num_cores() + 1,
            queue_images=settings.predict_queue,
            deadline_seconds=settings.predict_deadline_seconds,
            on_answer=lambda answer: metrics.observe_image(
                queue=answer.queue_seconds, decode=answer.decode_seconds, model=answer.model_seconds
            ),
        )
        metrics.predict_images.set_function(lambda: self.predictor.num_inside)
        self.following = Following(database, self.predictor, metrics)
        self.watchdog = Watchdog(self.predictor, self.following, hung_seconds=settings.predict_hung_seconds)

    def start(self) -> None:
        """Begin to watch; what aliases point at is loaded in the background, so that the start does not wait for it."""
        if self.answers:
            self.following.start()
            self.watchdog.start()

    def close(self) -> None:
        """Stop watching and answering."""
        self.watchdog.close()
        self.following.close()
        self.predictor.close()

    @contextmanager
    def generation_files(self, generation_id: str, *names: str) -> Iterator[dict[str, Path]]:
        """Those of a generation's files that it has, by name, for the length of the block; NotReady or NotFound without a generation."""
        with self._database.reading() as session:
            get_generation(session, generation_id)
            digests = {row.name: row.digest for row in list_files(session, generation_id) if row.name in names}
        with ExitStack() as opened:
            yield {name: opened.enter_context(self._files.reading(digest)) for name, digest in digests.items()}

    def _predictor_files(self, generation_id: str) -> Mapping[str, Path]:
        with self._database.reading() as session:
            get_generation(session, generation_id)
            digests = {row.name: row.digest for row in list_files(session, generation_id) if row.name in FILES}
        # A flipped bit in a weight is an answer that nobody can explain.
        return {name: self._storage.fetch(digest, verify=True) for name, digest in digests.items()}

    def in_memory(self, *, alias: str, generation_id: str | None) -> ServedGeneration | None:
        """The generation that a request means when this can be said without reading anything; else `resolve` must be asked."""
        if generation_id is not None:
            return self.predictor.find(generation_id)
        return self.predictor.find_alias(alias) if self.following.is_fresh(alias) else None

    def resolve(self, *, alias: str, generation_id: str | None) -> ServedGeneration:
        """The generation that a request means: the pinned one, else the alias's. Loads it when it is not in memory."""
        if generation_id is not None:
            return self.predictor.load(generation_id)
        if not self.following.is_fresh(alias):
            # This process was frozen, or has just started: others may have moved the alias meanwhile.
            self.following.catch_up(alias)
        if self.predictor.find_alias(alias) is None:
            self._follow_if_there(alias)
        return self.predictor.serving(alias)

    def _follow_if_there(self, alias: str) -> None:
        """Right after a start the watching thread may still be loading what rows already point at."""
        why = self.following.failure(alias)
        if why is not None:
            # It was tried a moment ago; each try reads the whole generation.
            raise StorageError(f"what the alias {alias!r} points at cannot be loaded: {why}", alias=alias)
        try:
            with self._database.reading() as session:
                row = get_alias(session, alias)
        except NotFound:
            return
        self.predictor.switch(alias, self.predictor.load(row.generation_id), version=row.version)

    def switch(self, alias: str, generation: ServedGeneration, *, version: int) -> None:
        """The alias was moved by this process: from now on it means this generation here. Where nothing is answered, it is let go."""
        if self.answers:
            self.predictor.switch(alias, generation, version=version)
        else:
            self.predictor.forget(generation.id)
