"""Workers over HTTP: what they can do, and taking one out of service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from core.db.workers import see_worker
from tests.server.builders import Api, add_job, add_worker, api_in_process, start_job
from workers.announcement import describe_worker


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


def test_a_worker_shows_what_it_can_do(api: Api) -> None:
    said = describe_worker("w:1:2", capabilities=("cpu",), slots=3)
    worker = add_worker(api.database, "w:1:2", slots=3, facts=said.facts, code_digest=said.code_digest)

    view = api.client.get(f"/api/v1/workers/{worker.id}").json()

    assert (view["slots"], view["capabilities"], view["code_digest"]) == (3, ["cpu"], said.code_digest)
    assert view["facts"]["num_cores"] >= 1
    assert view["facts"]["memory_bytes"] > 10**8
    assert view["facts"]["torch"][0].isdecimal()
    assert view["facts"]["queues"] == ["cpu"]
    assert view == api.client.get("/api/v1/workers").json()["items"][0]


def test_a_worker_that_said_less_is_shown_with_gaps(api: Api) -> None:
    with api.database.transaction() as session:
        columns = "id, name, host, boot_id, pid, capabilities, slots, version, started_at, seen_at"
        moment = "'2026-01-01 00:00:00.000000'"
        values = f"'wkr_old', 'old', 'h', 'b', 1, '[\"cpu\"]', 1, '0', {moment}, {moment}"
        session.execute(sa.text(f"INSERT INTO workers ({columns}) VALUES ({values})"))

    view = api.client.get("/api/v1/workers/wkr_old").json()

    assert (view["protocol"], view["code_digest"], view["draining_at"]) == (1, None, None)
    assert (view["facts"]["devices"], view["facts"]["torch"]) == ([], None)


def test_a_drained_worker_says_so_until_it_is_resumed(api: Api) -> None:
    worker = add_worker(api.database)
    job = start_job(api.database, add_job(api.database).id)

    drained = [api.client.post(f"/api/v1/workers/{worker.id}/drain").json() for _ in range(2)]
    [queue] = api.client.get("/api/v1/queues").json()["items"]
    resumed = api.client.post(f"/api/v1/workers/{worker.id}/resume").json()

    assert drained[0] == drained[1]
    assert (drained[0]["alive"], drained[0]["jobs"]) == (True, [job.id])
    assert drained[0]["draining_at"] is not None
    assert (queue["workers"], queue["draining"], queue["free_slots"]) == (1, 1, 0)
    assert resumed["draining_at"] is None


@pytest.mark.parametrize("verb", ["drain", "resume"])
def test_only_a_worker_that_is_there_can_be_steered(api: Api, verb: str) -> None:
    gone = add_worker(api.database, "gone")
    with api.database.transaction() as session:
        see_worker(session, gone.id, stopped=True)

    unknown = api.client.post(f"/api/v1/workers/wkr_nowhere/{verb}")
    stopped = api.client.post(f"/api/v1/workers/{gone.id}/{verb}")

    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    assert (stopped.status_code, stopped.json()["code"]) == (409, "wrong_state")
    assert "stopped at 20" in stopped.json()["detail"]


def test_steering_workers_needs_the_scope_admin(tmp_path: Path) -> None:
    with api_in_process(tmp_path, require_keys=True) as api:
        worker = add_worker(api.database)
        key = api.key("jobs:read", "jobs:write")

        answer = api.client.post(f"/api/v1/workers/{worker.id}/drain", headers=key)

        assert answer.status_code == 403
        assert api.client.get("/api/v1/workers", headers=key).status_code == 200
        assert api.client.post(f"/api/v1/workers/{worker.id}/drain", headers=api.key("admin")).status_code == 200
