"""Pages neither repeat nor skip, whatever is added meanwhile, and cursors cannot be made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from core.db.jobs import NewJob, enqueue, request_cancel
from core.db.session import Database
from core.db.tables import Job
from server.pages import Cursors, PageQuery, read_page
from tests.server.builders import Api, add_job, add_run, add_worker, api_in_process


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


def test_pages_are_stable_while_rows_are_added(api: Api) -> None:
    expected = [add_job(api.database).id for _ in range(10)][::-1]
    seen: list[str] = []
    cursor: str | None = ""

    while cursor is not None:
        page = api.client.get(f"/api/v1/jobs?limit=3&cursor={cursor}" if cursor else "/api/v1/jobs?limit=3").json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        add_job(api.database)

    assert seen == expected


def test_filters_hold_on_every_page(api: Api) -> None:
    wanted = {add_job(api.database, kind=kind).id for kind in ("import", "predict") * 3}
    page = api.client.get("/api/v1/jobs?kind=predict&limit=2").json()
    rest = api.client.get(f"/api/v1/jobs?kind=predict&limit=2&cursor={page['next_cursor']}").json()

    items = page["items"] + rest["items"]

    assert {job["kind"] for job in items} == {"predict"}
    assert len({job["id"] for job in items} & wanted) == 3
    assert rest["next_cursor"] is None


@pytest.mark.parametrize("position", [None, "job_9"])
def test_a_filtered_list_is_read_from_its_index(database: Database, position: str | None) -> None:
    for kind in ("ingest", "predict", "ingest"):
        add_job(database, kind=kind)
    cursors = Cursors(b"key")
    page = PageQuery(5, None if position is None else cursors.encode("jobs", [position]))
    asked: list[tuple[str, Any]] = []

    with database.reading() as session:
        connection = session.connection()
        sa.event.listen(connection, "before_cursor_execute", lambda *given: asked.append((given[2], given[3])))
        found, _ = read_page(session, sa.select(Job), Job.id, page, cursors=cursors, listing="jobs", among=(Job.kind, "ingest"))
        [(statement, parameters)] = asked
        # Three rows are read faster in any other way.
        for way in ("seqscan", "bitmapscan") if not database.is_sqlite else ():
            connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
        explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        plan = " ".join(str(row) for row in connection.exec_driver_sql(f"{explain} {statement}", parameters))

    assert [job.kind for job in found] == ["ingest"] * 2
    assert "ix_jobs_kind" in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def test_a_run_of_many_jobs_shows_the_first_ones_and_fewer_in_lists(api: Api) -> None:
    run, _ = add_run(api.database)
    with api.database.transaction() as session:
        labeling: dict[str, Any] = {"kind": "label", "input": {}, "run_id": run.id, "iteration": 0, "step": "label"}
        jobs = enqueue(session, [NewJob(**labeling, part=part) for part in range(250)])
        for job in jobs[:5]:
            request_cancel(session, job.id)

    alone = api.client.get(f"/api/v1/runs/{run.id}").json()
    [listed] = api.client.get("/api/v1/runs").json()["items"]

    open_ones = [job.id for job in jobs[5:]]
    assert (len(alone["jobs"]), len(alone["iterations"][0]["jobs"])) == (200, 200)
    assert set(alone["jobs"][1:]) < set(open_ones)
    assert set(alone["iterations"][0]["jobs"][1:]) < {job.id for job in jobs[:200]}
    assert (len(listed["jobs"]), len(listed["iterations"][0]["jobs"])) == (10, 10)
    assert listed["jobs"] == alone["jobs"][:10]


def test_an_altered_cursor_is_refused(api: Api) -> None:
    for _ in range(3):
        add_job(api.database)
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]
    altered = ("B" if cursor[0] == "A" else "A") + cursor[1:]

    answers = [api.client.get("/api/v1/jobs", params={"cursor": one}) for one in (altered, "x", "ä", "AAAA", cursor[:-2])]

    assert [answer.status_code for answer in answers] == [422] * 5
    assert answers[0].json()["errors"][0]["parameter"] == "cursor"


def test_a_cursor_is_good_for_its_own_list_and_filters_only(api: Api) -> None:
    for number in range(3):
        add_job(api.database)
        add_worker(api.database, f"worker-{number}")
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]

    assert api.client.get(f"/api/v1/jobs?status=queued&cursor={cursor}").status_code == 422
    assert api.client.get(f"/api/v1/workers?cursor={cursor}").status_code == 422


def test_replicas_read_each_others_cursors(api: Api, tmp_path: Path) -> None:
    for _ in range(3):
        add_job(api.database)
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]

    with api_in_process(tmp_path) as other:
        assert len(other.client.get(f"/api/v1/jobs?cursor={cursor}").json()["items"]) == 2
