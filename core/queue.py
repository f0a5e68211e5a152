"""The broker's door: publish a hint that a job waits. Nothing rests on it; a lost hint costs one polling interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from celery import Celery

TASK_NAME = "noisy_student.run_job"


class Queue(Protocol):
    """Where hints go."""

    def publish(self, job_id: str, *, capability: str) -> None:
        """Wake one worker with that capability; raises OSError when the broker is away."""


class PollingOnly:
    """The embedded service: no broker, the worker polls."""

    def publish(self, job_id: str, *, capability: str) -> None:
        """Do nothing: polling finds the job."""


class CeleryQueue:
    """Hints as Celery messages, one queue a capability."""

    def __init__(self, redis_url: str) -> None:
        self._app = make_celery(redis_url)

    def publish(self, job_id: str, *, capability: str) -> None:
        """Send `run_job(job_id)` by name; translates every broker error to OSError."""
        from kombu.exceptions import OperationalError

        try:
            self._app.send_task(TASK_NAME, args=[job_id], queue=capability, retry=False, ignore_result=True)
        except OperationalError as error:
            raise ConnectionError(f"the broker is away: {error}") from error


class HintBox:
    """A look at the hints that lie in the broker, past Celery: they tell whether anybody consumes."""

    def __init__(self, redis_url: str) -> None:
        self._app = make_celery(redis_url)

    def find_oldest(self, capability: str) -> bytes | None:
        """The hint of this capability that has lain there longest, as it is; None when there is none. OSError when the broker is away."""
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            with self._app.connection_for_read() as connection:
                # kombu pushes on the left and pops on the right.
                found: bytes | None = connection.default_channel.client.lindex(capability, -1)
                return found
        except (OperationalError, RedisError) as error:
            raise ConnectionError(f"the broker is away: {error}") from error


def make_celery(redis_url: str) -> Celery:
    """The one Celery configuration: ack early, prefetch 1, JSON, no results, no remote control (docs/decisions/0001)."""
    from celery import Celery

    app = Celery("noisy-student", broker=redis_url)
    app.conf.update(
        accept_content=["json"],
        # A worker does without the broker, so it waits for it for as long as it takes. Celery's own patience ends after a hundred tries.
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=2,
        broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 2, "socket_keepalive": True, "max_retries": 1},
        enable_utc=True,
        result_backend=None,
        task_acks_late=False,
        task_create_missing_queues=True,
        task_default_queue="cpu",
        task_ignore_result=True,
        task_serializer="json",
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
    )
    return app


def make_queue(redis_url: str | None) -> Queue:
    """The queue that the settings ask for."""
    return CeleryQueue(redis_url) if redis_url else PollingOnly()
