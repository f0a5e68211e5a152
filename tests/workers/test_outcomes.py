"""How an attempt's end becomes rows."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from core.db import jobs
from core.db.session import Database
from core.db.tables import Event
from tests.workers.test_controller import add_run, result_of
from workers.outcomes import record_success


def test_the_end_of_a_job_does_not_write_its_runs_row(database: Database) -> None:
    add_run(database)
    statements: list[str] = []
    with database.transaction() as session:
        job = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert job is not None
    made, files = result_of(job, top1=0.5)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(" ".join(statement.split()))

    sa.event.listen(database.engine(), "before_cursor_execute", note)
    with database.transaction() as session:
        assert record_success(session, job, made, files, {}) is not None
    sa.event.remove(database.engine(), "before_cursor_execute", note)

    # From then to the commit every other job of the run that writes it would wait.
    assert any(statement.startswith("UPDATE jobs") for statement in statements)
    assert not any(statement.startswith("UPDATE runs") for statement in statements)


def test_a_result_with_an_old_token_writes_nothing(database: Database) -> None:
    add_run(database)
    with database.transaction() as session:
        job = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert job is not None
        made, files = result_of(job, top1=0.5)
        assert record_success(session, job, made, files, {}) is not None
    before = count_events(database)

    with database.transaction() as session:
        assert record_success(session, job, made, files, {}) is None
        assert jobs.hold(session, job.id, token=job.token) is None

    assert count_events(database) == before


def count_events(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Event)) or 0
