"""Keeps this process with the alias rows, whoever moves them: one thread looks each second, one thread an alias loads and switches.

A slow or failing load holds up neither the next look nor another alias, and the old generation answers until the new one is warm.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import inf
from time import monotonic

import sqlalchemy as sa
import sqlalchemy.exc

from core.db.schema import current_revision, find_mismatch
from core.db.session import Database
from core.db.tables import Alias, Generation
from core.errors import ServiceError
from core.logs import get_log
from server.metrics import Metrics
from server.predictor import Predictor

WATCH_SECONDS = 1.0
FRESH_SECONDS = 3 * WATCH_SECONDS
"""What was read longer ago is not believed any more: this process was frozen, or the database is slow."""
AWAY_SECONDS = 10.0
"""How long the news that the database is away counts: longer than one vain attempt to connect takes."""
CATCH_UP_SECONDS = 4.0
"""What a request waits for a fresh look at the rows; then memory answers it."""
FOLLOWED_SECONDS = 5.0
"""Without a look for longer than this, although the database is there, a replica is not ready."""
OUTAGE_SECONDS = 600.0
"""How long a replica counts as ready while the database is away."""
LONGEST_PAUSE_SECONDS = 15.0
"""A load that fails is tried again after 1, 2, 4 … seconds, and at last this often: each try reads and hashes the whole generation."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an alias row says."""

    generation_id: str
    version: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an alias could not be followed, and when to try again."""

    target: Target
    why: str
    pause_seconds: float
    retry_at: float


class Following:
    """The alias rows as this process last saw them, and the threads that make the predictor do what they say."""

    def __init__(self, database: Database, predictor: Predictor, metrics: Metrics) -> None:
        self._database = database
        self._predictor = predictor
        self._metrics = metrics
        metrics.aliases_behind.set_function(lambda: len(self._behind()))
        metrics.alias_look_seconds.set_function(self.seconds_since_look)
        self._changed = threading.Condition()
        self._targets: dict[str, Target] = {}
        self._failures: dict[str, Failure] = {}
        self._loads: dict[str, threading.Thread] = {}
        self._late: dict[str, float] = {}
        self._mismatch: str | None = None
        self._looked_at, self._failed_at = -inf, -inf
        self._problem: str | None = None
        self._look_number, self._silent_look = 0, -1
        self._looking = False
        self._stop, self._wake = threading.Event(), threading.Event()
        self._watch = self._make_watch()

    def _make_watch(self) -> threading.Thread:
        return threading.Thread(target=self._keep_watching, name="alias-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._watch.start()

    def close(self) -> None:
        """Look no more, and wait a moment for what is being loaded."""
        self._stop.set()
        self._wake.set()
        for thread in (self._watch, *self._loads.values()):
            if thread.is_alive():
                thread.join(timeout=10)

    # Looking

    def _keep_watching(self) -> None:
        while not self._stop.is_set() and self._watch is threading.current_thread():
            self._wake.clear()
            self.look()
            self._wake.wait(WATCH_SECONDS)

    def look(self) -> None:
        """Read the alias rows once, forget generations that were deleted, and begin to load what rows name and nobody has loaded yet."""
        # What is read is as old as the beginning of the reading, however long this process is frozen in between.
        began = monotonic()
        self._look_number += 1
        self._looking = True
        try:
            mismatch, targets, deleted = self._read()
        except sa.exc.SQLAlchemyError as error:
            self._note_outage(f"the database does not answer: {type(error).__name__}")
            return
        finally:
            self._looking = False
        for generation_id in deleted:
            self._predictor.forget(generation_id)
        with self._changed:
            if began < self._looked_at:
                # A thread that was given up on has come back with old news.
                return
            self._mismatch, self._targets = mismatch, targets
            if began - self._looked_at > FRESH_SECONDS:
                # After a freeze: what the rows name now was named a while ago, so requests wait for its loading too.
                self._late = dict.fromkeys(self._behind(), monotonic() + CATCH_UP_SECONDS)
            self._looked_at, self._problem = began, None
            self._changed.notify_all()
        for alias in self._behind():
            self._load(alias)

    def _read(self) -> tuple[str | None, dict[str, Target], set[str]]:
        kept = self._predictor.kept()
        mismatch = find_mismatch(current_revision(self._database))
        with self._database.reading() as session:
            rows = session.execute(sa.select(Alias.name, Alias.generation_id, Alias.version)).all()
            there = set(session.scalars(sa.select(Generation.id).where(Generation.id.in_(kept)))) if kept else set()
        return mismatch, {name: Target(generation_id, version) for name, generation_id, version in rows}, set(kept) - there

    def _note_outage(self, problem: str) -> None:
        with self._changed:
            news, self._problem = problem != self._problem, problem
            self._failed_at = monotonic()
            self._changed.notify_all()
        if news:
            # The next look comes in a second; a lasting problem is not news then.
            get_log().error("alias.not_followed", alias="*", error=problem)

    # Loading

    def _behind(self) -> list[str]:
        """Aliases whose row names something newer than what they mean here."""
        served = self._predictor.versions()
        return [alias for alias, target in self._targets.items() if served.get(alias, 0) < target.version]

    def _load(self, alias: str) -> None:
        """Begin to load what the alias's row names, unless that is going on, or failed a moment ago."""
        failure, running = self._failures.get(alias), self._loads.get(alias)
        if failure is not None and failure.target == self._targets.get(alias) and monotonic() < failure.retry_at:
            return
        if running is None or not running.is_alive():
            thread = threading.Thread(target=self._follow, args=(alias,), name=f"alias-load-{alias}", daemon=True)
            self._loads[alias] = thread
            thread.start()

    def _follow(self, alias: str) -> None:
        """Load and switch until the alias means what its row says; rows may move on meanwhile."""
        while not self._stop.is_set() and alias in self._behind():
            target = self._targets.get(alias)
            if target is None:
                return
            try:
                self._predictor.switch(alias, self._predictor.load(target.generation_id), version=target.version)
            except (ServiceError, OSError, sa.exc.SQLAlchemyError) as error:
                # The old generation goes on answering.
                self._note_failure(alias, target, str(error))
                return
            with self._changed:
                self._failures.pop(alias, None)
                self._late.pop(alias, None)
                self._changed.notify_all()
            get_log().info("alias.switched", alias=alias, generation_id=target.generation_id, version=target.version)

    def _note_failure(self, alias: str, target: Target, why: str) -> None:
        before = self._failures.get(alias)
        again = before is not None and before.target == target
        pause = min(2 * before.pause_seconds, LONGEST_PAUSE_SECONDS) if before is not None and again else WATCH_SECONDS
        with self._changed:
            self._failures[alias] = Failure(target, why, pause, monotonic() + pause)
            self._late.pop(alias, None)
            self._changed.notify_all()
        self._metrics.alias_failures.labels(alias).inc()
        if before is None or (before.target, before.why) != (target, why):
            get_log().error("alias.not_followed", alias=alias, generation_id=target.generation_id, version=target.version, error=why)

    # What requests and health ask

    def is_fresh(self, alias: str) -> bool:
        """Whether what the alias means in memory can be believed without waiting: it is new, or nothing newer can be had."""
        now = monotonic()
        if now < self._late.get(alias, -inf):
            return False
        if now - self._looked_at <= FRESH_SECONDS or (self._looking and self._silent_look == self._look_number):
            return True
        return self._problem is not None and now - self._failed_at <= AWAY_SECONDS

    def catch_up(self, alias: str) -> None:
        """Wait until the rows were read anew and this alias means what they say; for CATCH_UP_SECONDS at most, then memory must do."""
        asked = monotonic()
        self._wake.set()

        def done() -> bool:
            if self._looked_at < asked:
                return self._failed_at >= asked
            return alias not in self._behind() or alias in self._failures

        with self._changed:
            if not self._changed.wait_for(done, CATCH_UP_SECONDS) and max(self._looked_at, self._failed_at) < asked:
                # One look that says nothing makes requests wait once, not each of them.
                self._silent_look = self._look_number

    def failure(self, alias: str) -> str | None:
        """Why the alias could not be followed, while it is not time to try again."""
        failure = self._failures.get(alias)
        return failure.why if failure is not None and monotonic() < failure.retry_at else None

    def seconds_since_look(self) -> float:
        """Age of what is known about the rows; infinite before the first look."""
        return monotonic() - self._looked_at

    def check(self) -> tuple[bool, dict[str, str]]:
        """Whether requests that come now are answered rightly, and each check with `ok` or what is wrong."""
        age = self.seconds_since_look()
        checks = {"database": self._check_database(), "aliases": "ok"}
        if age > FOLLOWED_SECONDS:
            checks["aliases"] = "the alias rows have not been read yet" if age == inf else f"the alias rows were last read {age:.0f} s ago"
        ready = self._mismatch is None and age <= (FOLLOWED_SECONDS if self._problem is None else OUTAGE_SECONDS)
        served = self._predictor.versions()
        for alias, target in sorted(self._targets.items()):
            checks[f"alias {alias}"] = self._check_alias(alias, target, served.get(alias))
            ready = ready and (alias in served or alias in self._failures)
        # One damaged generation does not take down the aliases that answer.
        return ready and (bool(served) or not self._targets), checks

    def _check_database(self) -> str:
        if self._problem is not None:
            return f"{self._problem}; what is in memory goes on answering"
        return self._mismatch or "ok"

    def _check_alias(self, alias: str, target: Target, served: int | None) -> str:
        if served is not None and served >= target.version:
            return "ok"
        failure = self._failures.get(alias)
        what = f"generation {target.generation_id} of version {target.version} " + (
            "is being loaded" if failure is None or failure.target != target else f"cannot be loaded: {failure.why}"
        )
        return f"{what}; " + ("nothing answers by this name" if served is None else f"version {served} goes on answering")

    # What the watchdog does

    @property
    def look_in_progress(self) -> int | None:
        """Number of the look that is going on."""
        return self._look_number if self._looking else None

    def keep_looking(self, *, hung: bool) -> None:
        """Go on with a new thread when the old one ended by a surprise, or hangs on a connection that will never answer."""
        if self._stop.is_set() or (self._watch.is_alive() and not hung):
            return
        get_log().error("alias.watch_restarted", why="it hung in a look at the rows" if hung else "it ended")
        if hung:
            # Its other connections may be as dead; what is in use elsewhere is left alone.
            self._database.close()
        self._looking = False
        self._watch = self._make_watch()
        self._watch.start()
