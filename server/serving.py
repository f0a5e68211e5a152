"""What this replica serves: the predictor's generations come from rows and stored files, its aliases follow the alias rows.

Another replica may move an alias. A thread looks at the alias rows each second and makes the same switch here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.exc

from core.db.files import list_files
from core.db.generations import get_generation
from core.db.promotions import get_alias
from core.db.session import Database
from core.db.tables import Alias, Generation
from core.errors import NotFound, ServiceError
from core.logs import get_log
from core.settings import Settings
from core.storage import Storage
from server.metrics import Metrics
from server.predictor import FILES, Predictor, ServedGeneration

WATCH_SECONDS = 1.0


class Serving:
    """The predictor, and the thread that keeps it with the alias rows."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, metrics: Metrics) -> None:
        self._database = database
        self._storage = storage
        self.predictor = Predictor(
            self._predictor_files,
            # One more than cores: now and then each waits for the interpreter.
            num_threads=settings.predict_threads or _cores() + 1,
            queue_images=settings.predict_queue,
            deadline_seconds=settings.predict_deadline_seconds,
            on_answer=lambda answer: metrics.observe_image(
                queue=answer.queue_seconds, decode=answer.decode_seconds, model=answer.model_seconds
            ),
        )
        metrics.predict_images.set_function(lambda: self.predictor.num_inside)
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._keep_watching, name="alias-watch", daemon=True)
        self._problems: dict[str, str] = {}

    def start(self) -> None:
        """Begin to watch; what aliases point at is loaded in the background, so that readiness does not wait for it."""
        self._watch.start()

    def close(self) -> None:
        """Stop watching and answering."""
        self._stop.set()
        if self._watch.is_alive():
            self._watch.join(timeout=10)
        self.predictor.close()

    def generation_files(self, generation_id: str) -> dict[str, Path]:
        """A generation's stored files by name; NotReady or NotFound when there is none."""
        with self._database.reading() as session:
            get_generation(session, generation_id)
            digests = {row.name: row.digest for row in list_files(session, generation_id)}
        return {name: self._storage.fetch(digest) for name, digest in digests.items()}

    def _predictor_files(self, generation_id: str) -> Mapping[str, Path]:
        with self._database.reading() as session:
            get_generation(session, generation_id)
            digests = {row.name: row.digest for row in list_files(session, generation_id) if row.name in FILES}
        # A flipped bit in a weight is an answer that nobody can explain.
        return {name: self._storage.fetch(digest, verify=True) for name, digest in digests.items()}

    def in_memory(self, *, alias: str, generation_id: str | None) -> ServedGeneration | None:
        """The generation that a request means when this can be said without reading anything; else `resolve` must be asked."""
        return self.predictor.find(generation_id) if generation_id is not None else self.predictor.find_alias(alias)

    def resolve(self, *, alias: str, generation_id: str | None) -> ServedGeneration:
        """The generation that a request means: the pinned one, else the alias's. Loads it when it is not in memory."""
        if generation_id is not None:
            return self.predictor.load(generation_id)
        if self.predictor.find_alias(alias) is None:
            self._follow_if_there(alias)
        return self.predictor.serving(alias)

    def _follow_if_there(self, alias: str) -> None:
        """Right after a start the watching thread may still be loading what rows already point at."""
        try:
            with self._database.reading() as session:
                row = get_alias(session, alias)
        except NotFound:
            return
        self.predictor.switch(alias, self.predictor.load(row.generation_id), version=row.version)

    def follow_aliases(self) -> None:
        """Switch every alias whose row was moved since, and forget generations that were deleted."""
        kept = self.predictor.kept()
        with self._database.reading() as session:
            rows = session.execute(sa.select(Alias.name, Alias.generation_id, Alias.version)).all()
            there = set(session.scalars(sa.select(Generation.id).where(Generation.id.in_(kept)))) if kept else set()
        for generation_id in set(kept) - there:
            self.predictor.forget(generation_id)
        seen = self.predictor.versions()
        for name, generation_id, version in rows:
            if seen.get(name, 0) < version:
                self._follow(name, generation_id, version)

    def _follow(self, name: str, generation_id: str, version: int) -> None:
        try:
            self.predictor.switch(name, self.predictor.load(generation_id), version=version)
        except (ServiceError, OSError) as error:
            # The old generation goes on answering, and the other aliases are followed all the same.
            self._say_once(name, str(error))
            return
        self._problems.pop(name, None)
        get_log().info("alias.switched", alias=name, generation_id=generation_id, version=version)

    def _say_once(self, name: str, problem: str) -> None:
        """The next look comes in a second; a lasting problem is not news then."""
        if self._problems.get(name) != problem:
            self._problems[name] = problem
            get_log().error("alias.not_followed", alias=name, error=problem)

    def _keep_watching(self) -> None:
        while not self._stop.is_set():
            try:
                self.follow_aliases()
                self._problems.pop("*", None)
            except sa.exc.SQLAlchemyError as error:
                self._say_once("*", f"the database does not answer: {type(error).__name__}")
            self._stop.wait(WATCH_SECONDS)


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
