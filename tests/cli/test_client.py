"""The HTTP client against the real API, through a wire that is cut again and again."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cli.client import API, ApiProblem, Client, JobFailed, NotReachable
from tests.server.builders import Api, add_job, api_on_a_socket, fail, report, start_job, succeed


class CuttingWire:
    """Passes connections on to a port, and cuts each after so many bytes of the answer."""

    def __init__(self, target: int, *, cut_after_bytes: int, port: int = 0) -> None:
        self._target = target
        self._cut_after_bytes = cut_after_bytes
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.num_cuts = 0
        self._open: list[socket.socket] = []

    def serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(near)
            threading.Thread(target=self._pass_on, args=(near,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        left = self._cut_after_bytes
        # The client may hang up first.
        with suppress(OSError), near, socket.create_connection(("127.0.0.1", self._target)) as far:
            threading.Thread(target=_pump, args=(near, far), daemon=True).start()
            while left > 0 and (data := far.recv(min(left, 4096))):
                near.sendall(data)
                left -= len(data)
            self.num_cuts += left == 0
            near.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # Closing alone does not wake a thread that is in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for near in self._open:
            with suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


def _pump(near: socket.socket, far: socket.socket) -> None:
    try:
        while data := near.recv(4096):
            far.sendall(data)
    except OSError:
        return


@contextmanager
def cutting_wire(api: Api, *, cut_after_bytes: int, port: int = 0) -> Iterator[CuttingWire]:
    wire = CuttingWire(api.client.base_url.port, cut_after_bytes=cut_after_bytes, port=port)
    thread = threading.Thread(target=wire.serve)
    thread.start()
    try:
        yield wire
    finally:
        wire.close()
        thread.join(10)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api_on_a_socket(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    opened = Client(str(api.client.base_url), None)
    yield opened
    opened.close()


def test_a_stream_that_is_cut_again_and_again_gives_each_event_once_and_in_order(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_SECONDS", 0.01)
    job = start_job(api.database, add_job(api.database).id)
    report(api.database, job, *(("metric", {"step": step, "loss": 1 / step}) for step in range(1, 101)))
    succeed(api.database, job)

    with cutting_wire(api, cut_after_bytes=2500) as wire:
        events = list(Client(wire.url, None).follow(f"{API}/jobs/{job.id}/events"))

    # queued, started, 100 metrics, succeeded, and the stream's own end.
    assert [event.number for event in events] == [*range(1, 104), None]
    assert [event.kind for event in events[-2:]] == ["succeeded", "end"]
    assert wire.num_cuts > 5


def test_a_stream_can_begin_after_an_event_that_was_seen(api: Api, client: Client) -> None:
    job = start_job(api.database, add_job(api.database).id)
    succeed(api.database, job)

    events = list(client.follow(f"{API}/jobs/{job.id}/events", after=2))

    assert [event.number for event in events] == [3, None]


def test_a_stream_goes_on_while_the_job_does(api: Api, client: Client) -> None:
    job = start_job(api.database, add_job(api.database).id)
    seen = []

    for event in client.follow(f"{API}/jobs/{job.id}/events"):
        seen.append(event.kind)
        if event.kind == "started":
            succeed(api.database, job)

    assert seen == ["queued", "started", "succeeded", "end"]


def test_a_refusal_is_a_problem_with_code_and_detail(client: Client) -> None:
    with pytest.raises(ApiProblem) as caught:
        client.get(f"{API}/jobs/job_nowhere")

    assert (caught.value.status, caught.value.code) == (404, "not_found")
    assert "job_nowhere" in caught.value.detail


def test_a_stream_of_something_that_is_not_there_is_refused_and_not_tried_again(client: Client) -> None:
    started = time.monotonic()

    with pytest.raises(ApiProblem):
        list(client.follow(f"{API}/runs/run_nowhere/events"))

    assert time.monotonic() - started < 10


def test_an_address_where_nothing_listens_is_not_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(NotReachable, match="noisy-student up"):
        Client(f"http://127.0.0.1:{port}", None).get(f"{API}/jobs")


def test_a_service_that_answered_before_is_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_SECONDS", 0.01)
    job = add_job(api.database)
    with cutting_wire(api, cut_after_bytes=10**6) as wire:
        client = Client(wire.url, None)
        client.get(f"{API}/jobs/{job.id}")

    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(client.get(f"{API}/jobs/{job.id}")), daemon=True)

    asking.start()
    with cutting_wire(api, cut_after_bytes=10**6, port=wire.port):
        asking.join(10)
    client.close()

    assert [answer["id"] for answer in answers] == [job.id]


def test_a_service_that_stays_away_is_given_up_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr("cli.client.PATIENCE_SECONDS", 0.1)
    with cutting_wire(api, cut_after_bytes=10**6) as wire:
        client = Client(wire.url, None)
        client.get("/livez")

    with pytest.raises(NotReachable, match="stopped answering"):
        client.get("/livez")
    client.close()


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [(503, "database_unavailable", True), (502, "unknown", True), (503, "nothing_promoted", False), (500, "unknown", False)],
)
def test_only_an_answer_that_says_nothing_of_the_request_is_waited_out(status: int, code: str, *, passes: bool) -> None:
    assert ApiProblem(status, {"code": code}).is_passing is passes


def test_waiting_for_a_job_that_fails_says_why(api: Api, client: Client) -> None:
    job = start_job(api.database, add_job(api.database).id)
    fail(api.database, job)

    with pytest.raises(JobFailed, match="it broke"):
        client.wait_for_job(job.id)


def test_pages_are_read_to_the_end_or_to_the_number_that_is_asked_for(api: Api, client: Client) -> None:
    ids = [add_job(api.database, kind="predict", input={}).id for _ in range(5)]

    everything = [job["id"] for job in client.pages(f"{API}/jobs", kind="predict", limit=2)]
    newest = [job["id"] for job in client.pages(f"{API}/jobs", kind="predict", most=3)]

    assert everything == ids[::-1]
    assert newest == ids[:1:-1]


def test_a_request_that_is_sent_twice_with_one_key_has_one_effect(api: Api, client: Client, tmp_path: Path) -> None:
    job = add_job(api.database)
    headers = {"Idempotency-Key": "one"}

    first, second = (client.request("POST", f"{API}/jobs/{job.id}/cancel", body={}, headers=headers) for _ in range(2))

    assert first.json() == second.json()
    assert second.headers["Idempotency-Replayed"] == "true"
