"""Event streams: every event once, in order, whatever is cut and wherever the reader comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from core.db.runs import move_run
from core.db.tables import Job
from server import progress
from tests.server.builders import Api, add_job, add_run, api_on_a_socket, report, start_job, succeed, wait_until

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_on_a_socket(tmp_path) as running:
        yield running


def read_stream(client: httpx.Client, path: str, *, last: int = 0, until: int | None = None) -> list[tuple[int | None, str, Any]]:
    """(id, event, data) up to the end of the stream, or cut after the event numbered `until`."""
    found: list[tuple[int | None, str, Any]] = []
    headers = STREAM | ({"Last-Event-ID": str(last)} if last else {})
    with client.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
            elif "event" in fields:
                number = int(fields["id"]) if "id" in fields else None
                found.append((number, fields["event"], json.loads(fields["data"])))
                fields = {}
                if until is not None and number is not None and number >= until:
                    break
            else:
                fields = {}
    return found


def test_a_stream_cut_again_and_again_has_no_gap_and_no_double(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)

    def write() -> None:
        for number in range(100):
            report(api.database, job, *[("metric", {"value": number * 3 + part}) for part in range(3)])
            time.sleep(0.005)
        succeed(api.database, job)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[tuple[int | None, str, Any]] = []
    while not seen or seen[-1][1] != "end":
        last = seen[-1][0] or 0 if seen else 0
        seen += read_stream(api.client, f"/api/v1/jobs/{job.id}/events", last=last, until=last + 37)
    writer.join()

    events = seen[:-1]
    assert [number for number, _, _ in events] == list(range(1, 304))
    assert [data["data"]["value"] for _, kind, data in events if kind == "metric"] == list(range(300))
    assert [kind for _, kind, _ in events][:2] == ["queued", "started"]
    assert events[-1][1] == "succeeded"
    assert seen[-1] == (None, "end", {"status": "succeeded"})


def test_another_replica_goes_on_where_the_first_was_cut(api: Api, tmp_path: Path) -> None:
    job = start_job(api.database, add_job(api.database).id)
    report(api.database, job, *[("metric", {"value": number}) for number in range(20)])
    first = read_stream(api.client, f"/api/v1/jobs/{job.id}/events", until=9)
    succeed(api.database, job)

    with api_on_a_socket(tmp_path) as other:
        rest = read_stream(other.client, f"/api/v1/jobs/{job.id}/events", last=first[-1][0] or 0)

    assert [number for number, _, _ in first + rest[:-1]] == list(range(1, 24))


def test_more_events_than_a_batch_arrive_whole(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    report(api.database, job, *[("metric", {"value": number}) for number in range(3 * progress.BATCH)])
    succeed(api.database, job)

    seen = read_stream(api.client, f"/api/v1/jobs/{job.id}/events")

    assert [number for number, _, _ in seen[:-1]] == list(range(1, 3 * progress.BATCH + 4))


def test_the_same_events_come_as_pages_of_json(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    report(api.database, job, *[("metric", {"value": number}) for number in range(5)])
    succeed(api.database, job)
    streamed = read_stream(api.client, f"/api/v1/jobs/{job.id}/events")

    first = api.client.get(f"/api/v1/jobs/{job.id}/events?limit=3").json()
    rest = api.client.get(f"/api/v1/jobs/{job.id}/events?after={first['next_after']}").json()

    assert first["items"] + rest["items"] == [data for _, _, data in streamed[:-1]]
    assert rest["status"] == "succeeded"


def test_a_runs_stream_counts_on_its_own_and_ends_with_the_run(api: Api) -> None:
    run, job = add_run(api.database)
    path = f"/api/v1/runs/{run.id}/events"
    running = start_job(api.database, job.id)
    first = read_stream(api.client, path, until=2)
    succeed(api.database, running)
    with api.database.transaction() as session:
        move_run(session, run.id, "completed")

    rest = read_stream(api.client, path, last=2)

    assert [(number, kind) for number, kind, _ in first + rest] == [(1, "queued"), (2, "started"), (3, "succeeded"), (None, "end")]
    assert rest[-1][2] == {"status": "completed"}


def test_a_reader_that_goes_away_leaves_nothing_behind(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)

    for _ in range(5):
        read_stream(api.client, f"/api/v1/jobs/{job.id}/events", until=1)

    wait_until(lambda: api.services.progress.num_watches == 0)


def test_a_hundred_streams_wait_at_the_cost_of_one_query_a_poll(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    limits = httpx.Limits(max_connections=None)
    ends: list[list[tuple[int | None, str, Any]]] = []
    with httpx.Client(base_url=api.client.base_url, timeout=60, trust_env=False, limits=limits) as client:
        readers = [threading.Thread(target=lambda: ends.append(read_stream(client, f"/api/v1/jobs/{job.id}/events"))) for _ in range(100)]
        for reader in readers:
            reader.start()
        wait_until(lambda: api.services.progress.num_watches == 100)
        started = time.monotonic()
        api.client.get("/livez").raise_for_status()
        assert time.monotonic() - started < 5
        succeed(api.database, job)
        for reader in readers:
            reader.join()

    assert len(ends) == 100
    assert {tuple(number for number, _, _ in seen) for seen in ends} == {(1, 2, 3, None)}


def follow_in_thread(api: Api, path: str) -> tuple[threading.Thread, list[Any]]:
    """A reader that waits, and where it will put what it sees."""
    found: list[Any] = []
    before = api.services.progress.num_watches
    reader = threading.Thread(target=lambda: found.extend(read_stream(api.client, path)))
    reader.start()
    wait_until(lambda: api.services.progress.num_watches == before + 1)
    return reader, found


def wait_for_look(api: Api, job: Job, number: int) -> None:
    """Until the poller has seen that the job has so many events."""
    wait_until(lambda: api.services.progress._marks.get(("job", job.id), (0, ""))[0] == number)


def test_streams_that_keep_up_share_what_one_look_finds(api: Api) -> None:
    jobs = [start_job(api.database, add_job(api.database).id) for _ in range(5)]
    readers = [follow_in_thread(api, f"/api/v1/jobs/{job.id}/events") for job in jobs for _ in range(4)]
    for job in jobs:
        wait_for_look(api, job, 2)
    statements: list[str] = []
    sa.event.listen(api.services.database._reading, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    for number in range(5):
        for job in jobs:
            report(api.database, job, ("metric", {"value": number}))
        for job in jobs:
            wait_for_look(api, job, 3 + number)
    reads = sum("FROM events" in statement for statement in statements)
    for job in jobs:
        succeed(api.database, job)
    for reader, _ in readers:
        reader.join()

    assert all([number for number, _, _ in found] == [*range(1, 9), None] for _, found in readers)
    # A look that falls between two reports finds them in two parts. Each stream by itself would have read 5 × 20 times.
    assert reads <= 20 + 2 * 5


def test_a_stream_that_is_told_too_much_at_once_reads_it_from_the_rows(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    reader, found = follow_in_thread(api, f"/api/v1/jobs/{job.id}/events")
    wait_for_look(api, job, 2)
    report(api.database, job, ("metric", {"value": 0}))
    wait_for_look(api, job, 3)

    report(api.database, job, *[("metric", {"value": number}) for number in range(2 * progress.TAIL)])
    succeed(api.database, job)
    reader.join()

    assert [number for number, _, _ in found] == [*range(1, 2 * progress.TAIL + 5), None]


def test_a_tail_has_no_hole_after_more_came_than_it_keeps() -> None:
    old = [(number, "") for number in range(6, 11)]

    tail = progress._lengthen(old, [(101, ""), (102, "")])

    assert [number for number, _ in tail] == [101, 102]
    assert [number for number, _ in progress._lengthen(tail, [(102, ""), (103, "")])] == [101, 102, 103]


def test_a_stream_is_not_told_lines_with_a_hole(api: Api) -> None:
    hub = progress.ProgressHub(api.database)
    watch = progress.Watch(progress.JOB_EVENTS, "job_x")
    hub._marks[watch.key] = 102, "running"
    hub._tails[watch.key] = [(number, "") for number in (*range(6, 11), 101, 102)]

    assert hub.tell(watch, 5) is None
    assert hub.tell(watch, 100) == [(101, ""), (102, "")]


def test_more_streams_than_the_cap_are_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MAX_WATCHES", 0)

    answer = api.client.get(f"/api/v1/jobs/{add_job(api.database).id}/events", headers=STREAM)

    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_a_last_event_id_that_is_no_number_is_refused(api: Api, last: str) -> None:
    answer = api.client.get(f"/api/v1/jobs/{add_job(api.database).id}/events", headers=STREAM | {"Last-Event-ID": last})

    assert answer.status_code == 422


def test_following_an_unknown_job_is_a_problem(api: Api) -> None:
    answer = api.client.get("/api/v1/jobs/job_unknown/events", headers=STREAM)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
