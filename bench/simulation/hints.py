"""Hints as Celery writes them into Redis, taken and handed on as `workers.tasks` does it, for all workers of one process."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import redis

from bench.simulation.fates import is_delivered_twice
from bench.simulation.plan import Notes, Shared
from core.db.session import Database
from core.db.tables import Job
from core.queue import TASK_NAME, make_celery
from workers.supervisor import HAND_ON_SECONDS

QUEUE = "cpu"
_LISTEN_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Hint:
    """What a message says."""

    job_id: str
    handed_on: int

    @classmethod
    def read(cls, message: bytes | str) -> Hint:
        """Celery's protocol 2: the body is [args, kwargs, …], in base64."""
        whole = json.loads(message)
        assert whole["headers"]["task"] == TASK_NAME, f"expected {TASK_NAME}, found {whole['headers']['task']}"
        arguments, named, _ = json.loads(base64.b64decode(whole["body"]))
        return cls(arguments[0], named.get("handed_on", 0))


@dataclass(slots=True)
class Bell:
    """Idle workers of one process wait here."""

    condition: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[str | None] = field(default_factory=deque)
    idle: int = 0
    stopped: bool = False

    def wait(self, seconds: float) -> str | None:
        """A job that somebody spoke of; None when it is time to look by oneself."""
        with self.condition:
            self.idle += 1
            self.condition.wait_for(lambda: self.stopped or bool(self.waiting), timeout=seconds)
            self.idle -= 1
            return self.waiting.popleft() if self.waiting else None

    def wake(self, job_id: str, *, wait_seconds: float) -> bool:
        """False when nobody became idle in time."""
        with self.condition:
            self.condition.wait_for(lambda: self.stopped or self.idle > len(self.waiting), timeout=wait_seconds)
            if self.stopped or self.idle <= len(self.waiting):
                return False
            self.waiting.append(job_id)
            self.condition.notify()
            return True

    def stop(self) -> None:
        with self.condition:
            self.stopped = True
            self.condition.notify_all()


def consume(shared: Shared, database: Database, bell: Bell, notes: Notes, *, num_workers: int) -> None:
    """Until the simulation ends. Some messages come twice; one that finds no idle worker is handed on once, then dropped."""
    assert shared.settings.redis_url is not None
    client = redis.Redis.from_url(shared.settings.redis_url)
    app = make_celery(shared.settings.redis_url)
    patience = HAND_ON_SECONDS / num_workers
    while not shared.stop.is_set():
        found = client.brpop([QUEUE], timeout=_LISTEN_SECONDS)
        if found is None:
            continue
        hint = Hint.read(found[1])
        notes.count("messages")
        times = 2 if hint.handed_on == 0 and is_delivered_twice(shared.plan.seed, hint.job_id) else 1
        notes.counts["messages that came twice"] += times - 1
        for _ in range(times):
            if bell.wake(hint.job_id, wait_seconds=patience):
                notes.count("workers woken")
            elif hint.handed_on == 0 and _waits(database, hint.job_id):
                app.send_task(TASK_NAME, args=[hint.job_id], kwargs={"handed_on": 1}, queue=QUEUE, retry=False, ignore_result=True)
                notes.count("messages handed on")
                # As many consumers as workers share this thread: together they are not faster than each for itself.
                time.sleep(patience)
    client.close()


def _waits(database: Database, job_id: str) -> bool:
    with database.reading() as session:
        job = session.get(Job, job_id)
        return job is not None and job.status == "queued"
