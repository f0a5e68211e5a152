"""Jobs over HTTP: list, wait, cancel, retry, logs, metrics, and why one waits."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import server.jobs
from core.db import jobs as rows
from core.db.files import name_files
from core.db.runs import last_iteration, move_run
from core.db.tables import Iteration, Job, Run
from tests.server.builders import Api, add_job, add_run, add_worker, api_in_process, api_on_a_socket, fail, report, start_job, succeed


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


def test_canceling_twice_changes_nothing(api: Api) -> None:
    job = add_job(api.database)

    answers = [api.client.post(f"/api/v1/jobs/{job.id}/cancel") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    assert answers[0].json()["status"] == "canceled"
    kinds = [event["kind"] for event in api.client.get(f"/api/v1/jobs/{job.id}/events").json()["items"]]
    assert kinds == ["queued", "canceled"]


def test_cancel_and_finish_at_one_moment_leave_one_end_and_gapless_events(tmp_path: Path) -> None:
    def cancel(api: Api, job: Job) -> int:
        answer = api.client.post(f"/api/v1/jobs/{job.id}/cancel")
        if answer.status_code == 202:
            # What its worker does once it sees the wish.
            with api.database.transaction() as session:
                rows.cancel_held(session, job.id, token=job.token)
        return answer.status_code

    def finish(api: Api, job: Job) -> None:
        with api.database.transaction() as session:
            rows.succeed(session, job.id, token=job.token, result={"done": True})

    with api_on_a_socket(tmp_path) as api:
        running = [start_job(api.database, add_job(api.database).id) for _ in range(12)]
        with ThreadPoolExecutor(4) as pool:
            asked = [(pool.submit(cancel, api, job), pool.submit(finish, api, job)) for job in running]
            statuses = [(one.result(), other.result())[0] for one, other in asked]

        for job, status in zip(running, statuses, strict=True):
            ended = api.client.get(f"/api/v1/jobs/{job.id}").json()["status"]
            events = api.client.get(f"/api/v1/jobs/{job.id}/events").json()["items"]
            assert ended in ("succeeded", "canceled")
            assert status == 202 or (status, ended) == (409, "succeeded")
            assert [event["number"] for event in events] == list(range(1, len(events) + 1))
            assert [event["kind"] for event in events if event["kind"] in ("succeeded", "canceled")] == [ended]


def test_a_running_job_is_asked_to_stop_and_says_since_when(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)

    answers = [api.client.post(f"/api/v1/jobs/{job.id}/cancel").json() for _ in range(2)]

    assert [answer["status"] for answer in answers] == ["running", "running"]
    assert answers[0]["cancel_requested_at"] == answers[1]["cancel_requested_at"] is not None


def test_a_finished_job_cannot_be_canceled(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    succeed(api.database, job)

    answer = api.client.post(f"/api/v1/jobs/{job.id}/cancel")

    assert (answer.status_code, answer.json()["code"]) == (409, "wrong_state")


def test_a_failed_job_can_be_retried_and_a_running_one_cannot(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    refused = api.client.post(f"/api/v1/jobs/{job.id}/retry")
    fail(api.database, job)

    answer = api.client.post(f"/api/v1/jobs/{job.id}/retry")

    assert (refused.status_code, answer.status_code) == (409, 202)
    assert (answer.json()["status"], answer.json()["error"], answer.json()["lost_attempts"]) == ("queued", None, 0)
    assert answer.headers["location"] == f"/api/v1/jobs/{job.id}"


def test_retrying_a_runs_failed_job_lets_the_run_go_on(api: Api) -> None:
    run, job = add_run(api.database)
    fail(api.database, start_job(api.database, job.id))
    with api.database.transaction() as session:
        move_run(session, run.id, "failed", error={"code": "broken"})
        session.execute(sa.update(Iteration).where(Iteration.run_id == run.id).values(phase="failed"))

    answer = api.client.post(f"/api/v1/jobs/{job.id}/retry")

    assert answer.status_code == 202
    with api.database.reading() as session:
        assert session.get_one(Run, run.id).status == "active"
        assert session.get_one(Run, run.id).error is None
        assert last_iteration(session, run.id).phase == "training"


def test_retrying_one_failed_shard_queues_the_others_of_its_iteration_again(api: Api) -> None:
    run, training = add_run(api.database)
    shards = [add_job(api.database, kind="label", run_id=run.id, iteration=1, step="label", part=part) for part in range(4)]
    for shard in (training, *shards[:2]):
        fail(api.database, start_job(api.database, shard.id))
    api.client.post(f"/api/v1/jobs/{shards[2].id}/cancel")
    with api.database.transaction() as session:
        move_run(session, run.id, "failed", error={"code": "broken"})

    assert api.client.post(f"/api/v1/jobs/{shards[0].id}/retry").status_code == 202

    jobs = {job["id"]: job["status"] for job in api.client.get(f"/api/v1/jobs?run_id={run.id}").json()["items"]}
    assert jobs == dict.fromkeys((shard.id for shard in shards), "queued") | {training.id: "failed"}


def test_canceling_a_run_waits_for_a_report_of_its_job_instead_of_locking_against_it(tmp_path: Path, postgresql_url: str) -> None:
    with api_in_process(tmp_path, database_url=postgresql_url) as api, ThreadPoolExecutor(1) as thread:
        run, job = add_run(api.database)
        job = start_job(api.database, job.id)
        with api.database.transaction() as session:
            assert rows.heartbeat(session, job.id, token=job.token, lease_seconds=60, progress=None) is not None
            canceling = thread.submit(api.client.post, f"/api/v1/runs/{run.id}/cancel")
            time.sleep(0.5)
            assert not canceling.done()
            assert rows.report(session, job.id, token=job.token, items=[("note", {})])

        answer = canceling.result(timeout=20)

    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")


def test_a_job_of_a_canceled_run_stays_canceled(api: Api) -> None:
    run, job = add_run(api.database)
    api.client.post(f"/api/v1/jobs/{job.id}/cancel")
    with api.database.transaction() as session:
        move_run(session, run.id, "canceled")

    answer = api.client.post(f"/api/v1/jobs/{job.id}/retry")

    assert answer.status_code == 409
    assert api.client.get(f"/api/v1/jobs/{job.id}").json()["status"] == "canceled"


def test_a_waiting_job_says_what_it_waits_for(api: Api) -> None:
    plain, cuda = add_job(api.database), add_job(api.database, capability="cuda")
    run, training = add_run(api.database)
    with api.database.transaction() as session:
        move_run(session, run.id, "paused")

    add_worker(api.database, "gone", capabilities=("cuda",), silent_seconds=3600)
    before = {job["id"]: job["waiting_for"] for job in api.client.get("/api/v1/jobs").json()["items"]}
    add_worker(api.database)
    after = {job["id"]: job["waiting_for"] for job in api.client.get("/api/v1/jobs").json()["items"]}

    assert before[plain.id] == "no worker with capability cpu"
    assert after[plain.id] == "a worker's next look (free slots with capability cpu: 2 of 2)"
    assert after[cuda.id] == "no worker with capability cuda"
    assert after[training.id] == "its run is paused"


def test_a_preferred_wait_ends_when_the_job_does(tmp_path: Path) -> None:
    with api_on_a_socket(tmp_path) as api, ThreadPoolExecutor(1) as thread:
        job = start_job(api.database, add_job(api.database).id)
        waiting = thread.submit(api.client.get, f"/api/v1/jobs/{job.id}", headers={"Prefer": "wait=20"})
        time.sleep(0.3)
        assert not waiting.done()
        started = time.monotonic()
        succeed(api.database, job)

        answer = waiting.result(timeout=20)

        assert answer.json()["status"] == "succeeded"
        assert answer.headers["preference-applied"] == "wait=20"
        assert time.monotonic() - started < 10


def test_a_preferred_wait_is_over_in_time(api: Api) -> None:
    job = add_job(api.database)
    started = time.monotonic()

    answer = api.client.get(f"/api/v1/jobs/{job.id}", headers={"Prefer": "respond-async, wait=1"})

    assert answer.json()["status"] == "queued"
    assert 0.9 < time.monotonic() - started < 10
    assert api.client.get("/api/v1/jobs/job_unknown", headers={"Prefer": "wait=20"}).status_code == 404


def test_the_newest_attempts_log_is_shown_from_its_end(api: Api) -> None:
    job = add_job(api.database)
    missing = api.client.get(f"/api/v1/jobs/{job.id}/logs")
    folder = api.services.settings.attempts_directory / job.id
    folder.mkdir(parents=True)
    (folder / "attempt-1.log").write_text("first")
    (folder / "attempt-2.log").write_text("x" * 100_000 + "the end")

    newest = api.client.get(f"/api/v1/jobs/{job.id}/logs").json()
    first = api.client.get(f"/api/v1/jobs/{job.id}/logs?attempt=1").json()

    assert missing.status_code == 404
    assert (newest["attempt"], newest["attempts"], newest["truncated"]) == (2, [1, 2], True)
    assert newest["text"].endswith("xthe end")
    assert len(newest["text"]) == 64 * 1024
    assert (first["text"], first["truncated"]) == ("first", False)


def test_a_log_of_another_host_comes_from_storage(api: Api, tmp_path: Path) -> None:
    job = add_job(api.database)
    (tmp_path / "log").write_text("it broke there")
    with api.database.transaction() as session:
        name_files(session, job.id, {"attempt-1.log": api.services.storage.put(tmp_path / "log")})

    assert api.client.get(f"/api/v1/jobs/{job.id}/logs").json()["text"] == "it broke there"


def test_a_log_whose_folder_goes_while_it_is_asked_for_comes_from_storage(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = add_job(api.database)
    log = api.services.settings.attempts_directory / job.id / "attempt-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("it ended just then")
    read = server.jobs._tail

    def end_then_read(path: Path) -> Any:
        if path == log:
            with api.database.transaction() as session:
                name_files(session, job.id, {log.name: api.services.storage.put(log)})
            shutil.rmtree(log.parent)
        return read(path)

    monkeypatch.setattr(server.jobs, "_tail", end_then_read)
    answer = api.client.get(f"/api/v1/jobs/{job.id}/logs")

    assert (answer.status_code, answer.json()["text"]) == (200, "it ended just then")


def test_a_folder_that_goes_while_its_logs_are_listed_is_an_empty_one(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = add_job(api.database)
    folder = api.services.settings.attempts_directory / job.id
    folder.mkdir(parents=True)

    def losing(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def lose(path: Any) -> Any:
            if Path(path) == folder:
                folder.rmdir()
            return look(path)

        return lose

    with monkeypatch.context() as patch:
        # Which of them pathlib asks depends on the version of Python.
        patch.setattr(os, "scandir", losing(os.scandir))
        patch.setattr(os, "listdir", losing(os.listdir))
        answer = api.client.get(f"/api/v1/jobs/{job.id}/logs")

    assert answer.json()["detail"].endswith("has no log yet")


def test_an_attempt_that_wrote_nothing_has_an_empty_log(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    succeed(api.database, job)

    answer = api.client.get(f"/api/v1/jobs/{job.id}/logs")

    assert (answer.status_code, answer.json()["attempt"], answer.json()["text"]) == (200, 1, "")
    assert api.client.get(f"/api/v1/jobs/{job.id}/logs?attempt=2").status_code == 404


def test_metric_points_are_read_in_order(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    report(api.database, job, ("metric", {"loss": 2.0}), ("note", {"text": "x"}), ("metric", {"loss": 1.0}))

    page = api.client.get(f"/api/v1/jobs/{job.id}/metrics?limit=1").json()
    rest = api.client.get(f"/api/v1/jobs/{job.id}/metrics?after={page['next_after']}").json()

    assert [item["data"] for item in page["items"] + rest["items"]] == [{"loss": 2.0}, {"loss": 1.0}]


def test_workers_and_queues_show_who_runs_what(api: Api) -> None:
    job = start_job(api.database, add_job(api.database).id)
    add_job(api.database)
    add_job(api.database, capability="cuda")
    add_worker(api.database)
    add_worker(api.database, "gone", silent_seconds=3600)

    workers = {worker["name"]: worker for worker in api.client.get("/api/v1/workers").json()["items"]}
    queues = {queue["capability"]: queue for queue in api.client.get("/api/v1/queues").json()["items"]}

    assert (workers["worker-1"]["alive"], workers["worker-1"]["jobs"]) == (True, [job.id])
    assert not workers["gone"]["alive"]
    counts = ("waiting", "running", "workers", "draining", "slots", "free_slots")
    assert [queues["cpu"][name] for name in counts] == [1, 1, 1, 0, 2, 1]
    assert [queues["cuda"][name] for name in counts] == [1, 0, 0, 0, 0, 0]
    assert queues["cuda"]["reasons"] == [{"code": "no_worker", "message": "no worker with capability cuda", "jobs": 1}]
