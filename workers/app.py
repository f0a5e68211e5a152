"""`celery -A workers.app worker -Q cpu`: on any host a full worker, whose capabilities are the queues that it consumes."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import sqlalchemy.exc
from celery import signals

from core.errors import SetupError
from core.logs import configure_logs, get_log
from core.queue import HintBox, make_celery
from core.settings import Settings
from workers import tasks
from workers.watchdog import Watchdog
from workers.worker import FullWorker

settings = Settings()
redis_url = settings.redis_url or "redis://127.0.0.1:6379/0"
app = make_celery(redis_url)
# Supervisor and task live in one process: a forked one would have neither the slots nor the database.
app.conf.update(worker_pool="threads", worker_concurrency=settings.slots, worker_redirect_stdouts=False)
_worker: FullWorker | None = None


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def refuse_without_broker(**_: Any) -> None:
    """Celery would look for a broker on this host for ever."""
    if settings.redis_url is None:
        configure_logs(json_lines=not sys.stderr.isatty())
        get_log().error("worker.cannot_start", error="NOISY_STUDENT_REDIS_URL is not set; without a broker start `python -m workers`")
        raise SystemExit(2)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def start(instance: Any, **_: Any) -> None:
    """Begin to work, while Celery still looks for the broker: it may be away. A worker that cannot start ends with status 2."""
    global _worker
    configure_logs(json_lines=not sys.stderr.isatty())
    capabilities = tuple(sorted(instance.app.amqp.queues.consume_from))
    try:
        _worker = FullWorker(settings, capabilities=capabilities, on_crash=give_up)
        _worker.start()
    except SetupError as error:
        get_log().error("worker.cannot_start", error=error.message)
        raise SystemExit(2) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        # Celery would log it and go on consuming hints, with nobody here to take them. Whoever restarts dead workers tries again.
        get_log().error("worker.cannot_start", error=str(error).splitlines()[0])
        raise SystemExit(1) from error
    watchdog = Watchdog(
        HintBox(redis_url),
        capabilities,
        num_idle_slots=_worker.supervisor.num_idle_slots,
        patience_seconds=settings.consumer_patience_seconds,
        on_deaf=give_up,
    )
    watchdog.start()


def give_up() -> None:
    """This process cannot go on: hand over what it has, and end with status 1, so that a fresh one is started.

    Not by way of Celery's own shutdown, which ends with 0 and needs the consumer's loop to turn.
    """
    threading.Thread(target=_hand_over_and_exit, name="give-up").start()


def _hand_over_and_exit() -> None:
    try:
        if _worker is not None:
            _worker.stop()
    finally:
        os._exit(1)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def begin_to_stop(**_: Any) -> None:
    """The first signal came: attempts write their checkpoints while Celery winds down."""
    if _worker is not None:
        _worker.supervisor.stopping.set()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def stop(**_: Any) -> None:
    """Celery has ended: wait until everything is handed over."""
    if _worker is not None:
        _worker.stop()


run_job = tasks.register(app, lambda: _worker.supervisor if _worker is not None else None)
