"""A PostgreSQL that says nothing, or whose answer to a commit is lost on the way: to everybody here it is a database that went away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import sqlalchemy as sa

from core.db.session import Database
from core.settings import Settings
from tests.builders_services import wait_until
from tests.core.test_claims import add_jobs
from tests.core.test_leases import read, start
from tests.faults.proxy import Proxy, connect_to

SILENCE_SECONDS = 0.5


def answers(database: Database) -> bool:
    """Whether a query comes through."""
    try:
        with database.reading() as session:
            return bool(session.scalar(sa.text("SELECT 1")))
    except sa.exc.OperationalError:
        return False


@contextmanager
def behind_a_proxy(postgresql_url: str) -> Iterator[tuple[Database, Database, Proxy]]:
    """The database through a proxy, the same without one, and the proxy."""
    address, _, directory = postgresql_url.partition("?host=")
    proxy = Proxy(connect_to(f"{directory}/.s.PGSQL.5432"))
    url = address.replace("postgres@/", f"postgres@127.0.0.1:{proxy.port}/")
    through = Database(Settings(database_url=url).resolved_database_url, silence_seconds=SILENCE_SECONDS)
    direct = Database(Settings(database_url=postgresql_url).resolved_database_url)
    try:
        yield through, direct, proxy
    finally:
        proxy.close()
        through.close()
        direct.close()


def test_a_silent_database_is_given_up_on_in_the_middle_of_a_statement_and_of_a_commit(postgresql_url: str) -> None:
    with behind_a_proxy(postgresql_url) as (database, direct, proxy):
        job = start(direct)
        started = time.monotonic()

        def fall_silent_before_the_statement() -> None:
            with database.reading() as session:
                session.execute(sa.text("SELECT 1"))
                proxy.silent = True
                session.execute(sa.text("SELECT 2"))

        def fall_silent_before_the_commit() -> None:
            with database.transaction() as session:
                session.execute(sa.text("UPDATE jobs SET priority = 7"))
                proxy.silent = True

        for fall_silent in (fall_silent_before_the_statement, fall_silent_before_the_commit):
            with pytest.raises(sa.exc.OperationalError):
                fall_silent()
            proxy.speak_again()

        assert time.monotonic() - started < 20 * SILENCE_SECONDS
        assert read(direct, job.id).priority == 0
        # What the proxy still cuts of the old connections is a database that is away once more, and then it is there.
        assert wait_until(partial(answers, database), what="an answer through the proxy")


def test_a_slow_answer_is_no_silence(postgresql_url: str) -> None:
    with behind_a_proxy(postgresql_url) as (database, _, _), database.reading() as session:
        session.execute(sa.text("SELECT 1"))

        answers = [session.scalar(sa.text(f"SELECT {number} FROM pg_sleep({SILENCE_SECONDS / 2})")) for number in range(3)]

    assert answers == [0, 1, 2]


def test_a_commit_whose_answer_is_lost_is_reported_as_failed_and_has_happened(postgresql_url: str) -> None:
    with behind_a_proxy(postgresql_url) as (database, direct, proxy):
        proxy.commits_to_cut = 1

        with pytest.raises(sa.exc.OperationalError):
            add_jobs(database)

        with direct.reading() as session:
            assert session.scalar(sa.text("SELECT count(*) FROM jobs")) == 1
        assert proxy.num_commits_cut == 1
