"""How an attempt's end becomes rows."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from core.db import jobs
from core.db.session import Database
from tests.workers.test_controller import add_run, read_run, result_of
from workers.outcomes import record_success


def test_a_run_is_held_only_while_the_last_event_is_written(database: Database) -> None:
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

    # Every other job of the run waits from the moment in which its row is written to the commit.
    place = next(number for number, statement in enumerate(statements) if statement.startswith("UPDATE runs"))
    assert [statement.split(" (")[0] for statement in statements[place + 1 :]] == ["INSERT INTO events"]


def test_a_result_with_an_old_token_writes_nothing(database: Database) -> None:
    run_id = add_run(database)
    with database.transaction() as session:
        job = jobs.claim(session, holder="w", capabilities=["cpu"], lease_seconds=60)
        assert job is not None
        made, files = result_of(job, top1=0.5)
        assert record_success(session, job, made, files, {}) is not None
    before = read_run(database, run_id).num_events

    with database.transaction() as session:
        assert record_success(session, job, made, files, {}) is None
        assert jobs.hold(session, job.id, token=job.token) is None

    assert read_run(database, run_id).num_events == before
