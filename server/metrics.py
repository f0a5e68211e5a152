"""Prometheus metrics of one API process, and of the rows that all share."""

from __future__ import annotations

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy.orm import Session

from core.db.session import now
from core.db.tables import Job, OutboxMessage, Run, Worker
from core.lifecycle import JOB_STATUSES, RUN_STATUSES
from core.version import VERSION
from server.counted import Counted

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """A registry of its own, so that two apps in one process do not mix."""

    def __init__(self, *, of_rows: bool = True) -> None:
        """A predictor replica reads no rows for numbers: `of_rows` off leaves those out that would stay at zero."""
        self.registry = CollectorRegistry()
        rows = self.registry if of_rows else CollectorRegistry()
        self.requests = Counter("noisy_student_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "noisy_student_request_seconds", "Time to the end of an answer.", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.predict_seconds = Histogram(
            "noisy_student_predict_seconds",
            "What an answered image took: waiting (queue), decoding (decode), the network (model).",
            ("part",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.predict_images = Gauge("noisy_student_predict_images", "Images that wait or are being answered.", registry=self.registry)
        self.aliases_behind = Gauge(
            "noisy_student_aliases_behind", "Aliases whose row names a generation that is not served here yet.", registry=self.registry
        )
        self.alias_failures = Counter(
            "noisy_student_alias_failures",
            "Generations that could not be loaded for an alias, tries counted.",
            ("alias",),
            registry=self.registry,
        )
        self.alias_look_seconds = Gauge(
            "noisy_student_alias_look_seconds", "Age of what this process knows about the alias rows.", registry=self.registry
        )
        self.streams = Gauge("noisy_student_event_streams", "Open event streams.", registry=rows)
        self.jobs = Gauge("noisy_student_jobs", "Jobs by status.", ("status",), registry=rows)
        self.runs = Gauge("noisy_student_runs", "Runs by status.", ("status",), registry=rows)
        self.outbox = Gauge("noisy_student_outbox", "Hints that wait to be published.", registry=rows)
        self.workers = Gauge("noisy_student_workers", "Workers that did not say good-bye.", registry=rows)
        self.oldest = Gauge("noisy_student_oldest_queued_seconds", "Age of the oldest queued job.", registry=rows)
        self._num_jobs: Counted[dict[str, int]] = Counted()
        info = Gauge("noisy_student_info", "The version that runs.", ("version",), registry=self.registry)
        info.labels(VERSION).set(1)

    def observe(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def observe_image(self, *, queue: float, decode: float, model: float) -> None:
        """Count an image that the predictor answered; seconds."""
        for part, seconds in (("queue", queue), ("decode", decode), ("model", model)):
            self.predict_seconds.labels(part).observe(seconds)

    def read_rows(self, session: Session) -> None:
        """Set what the database knows."""
        by_status = sa.select(Job.status, sa.func.count()).group_by(Job.status)
        jobs: dict[str, int] = self._num_jobs.read(lambda: dict(session.execute(by_status).all()))
        for status in JOB_STATUSES:
            self.jobs.labels(status).set(jobs.get(status, 0))
        runs = dict(session.execute(sa.select(Run.status, sa.func.count()).group_by(Run.status)).all())
        for status in RUN_STATUSES:
            self.runs.labels(status).set(runs.get(status, 0))
        waiting = sa.select(sa.func.count()).select_from(OutboxMessage).where(OutboxMessage.published_at.is_(None))
        self.outbox.set(session.scalar(waiting) or 0)
        self.workers.set(session.scalar(sa.select(sa.func.count()).select_from(Worker).where(Worker.stopped_at.is_(None))) or 0)
        # Ids are in the order of time: one row is read, not the whole queue.
        oldest = session.scalar(sa.select(Job.created_at).where(Job.status == "queued").order_by(Job.id).limit(1))
        self.oldest.set((now(session) - oldest).total_seconds() if oldest is not None else 0)

    def render(self) -> bytes:
        """Everything in the text format."""
        return generate_latest(self.registry)
