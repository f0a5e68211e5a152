"""The one place that opens the database and commits.

SQLite gets two engines: a deferred transaction that reads and then writes fails at once with "locked" whatever the timeout, and
BEGIN IMMEDIATE makes reads take the write lock. PostgreSQL uses one engine for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
import sqlalchemy.exc
from sqlalchemy.orm import Session

BUSY_TIMEOUT_SECONDS = 30
IDLE_TRANSACTION_SECONDS = 10.0
"""Transactions are short: one that says nothing for this long belongs to a frozen process or a lost host."""
STATEMENT_SECONDS = 60
SILENCE_SECONDS = STATEMENT_SECONDS + 5.0
"""PostgreSQL ends every statement before: who has not heard by then is cut off from it (docs/decisions/0018)."""
_TCP = {"tcp_user_timeout": 20_000, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A host that vanished from the network is noticed by the kernel within these milliseconds and seconds."""

AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
"""What SQLAlchemy raises when the database cannot be reached, is locked for too long, or has no room."""


class Database:
    """Opened once a process; `transaction()` writes, `reading()` reads."""

    def __init__(
        self, url: str, *, idle_transaction_seconds: float = IDLE_TRANSACTION_SECONDS, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """After `idle_transaction_seconds` PostgreSQL rolls a silent transaction back, so that its locks hold nobody else.

        A PostgreSQL that leaves a statement without an answer for `silence_seconds` counts as away.
        """
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            self._writing = _sqlite_engine(url, begin="BEGIN IMMEDIATE")
            self._reading = _sqlite_engine(url, begin="BEGIN DEFERRED")
        else:
            idle_ms = round(idle_transaction_seconds * 1000)
            timeouts = f"-c statement_timeout={STATEMENT_SECONDS * 1000} -c idle_in_transaction_session_timeout={idle_ms}"
            self._writing = self._reading = sa.create_engine(
                url,
                pool_pre_ping=True,
                pool_size=10,
                max_overflow=30,
                connect_args={"connect_timeout": 5, "options": timeouts, **_TCP},
            )
            sa.event.listens_for(self._writing, "do_connect")(_impatiently(silence_seconds))
            sa.event.listens_for(self._writing, "handle_error")(_call_lost_connections_operational)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that may write; commits at the end of the block, rolls back when it raises."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads, from one snapshot on SQLite."""
        with Session(self._reading, expire_on_commit=False, autoflush=False) as session:
            yield session

    def engine(self) -> sa.Engine:
        """The writing engine, for migrations."""
        return self._writing

    def close(self) -> None:
        """Give every connection back."""
        self._writing.dispose()
        self._reading.dispose()


def _sqlite_engine(url: str, *, begin: str) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own transaction handling would start deferred ones behind our back.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_SECONDS * 1000}"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _impatiently(silence_seconds: float) -> Any:
    """A connect that gives up on a server that says nothing: psycopg alone would wait for ever for an answer that was lost on the way."""

    def connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> Any:
        connection = _impatient_connection().connect(*arguments, **named)
        connection.silence_seconds = silence_seconds
        return connection

    return connect


@cache
def _impatient_connection() -> Any:
    import psycopg
    from psycopg.pq import TransactionStatus

    class ImpatientConnection(psycopg.Connection[Any]):
        silence_seconds = SILENCE_SECONDS

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            """Every statement, commits included, waits here for its answer."""
            try:
                return super().wait(gen, interval, self.silence_seconds if timeout is None else timeout)
            except psycopg.OperationalError:
                if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                    # Still waiting: nobody may use this connection for anything else, and nobody would get its late answer.
                    self.pgconn.finish()
                raise

    return ImpatientConnection


def _call_lost_connections_operational(context: sa.ExceptionContext) -> None:
    """What was rolled back because this process was frozen comes as an InternalError; to everybody here it is a database that went away."""
    if context.is_disconnect and not isinstance(context.sqlalchemy_exception, sa.exc.OperationalError):
        raise sa.exc.OperationalError(context.statement, context.parameters, context.original_exception, connection_invalidated=True)


def now(session: Session) -> datetime:
    """The database's clock: the only one that leases are compared with."""
    if session.get_bind().dialect.name == "sqlite":
        text = session.execute(sa.text("SELECT strftime('%Y-%m-%dT%H:%M:%f', 'now')")).scalar_one()
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    moment: datetime = session.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    return moment.astimezone(UTC)
