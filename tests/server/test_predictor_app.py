"""The predictor as an app of its own: a few routes, each with its key; and an API that leaves /predict to it."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from PIL import Image
from starlette.testclient import TestClient

from core.db.schema import migrate
from server import auth, watchdog
from server.app import create_predictor
from server.auth import KeyRing, Principal
from server.predictor import Predictor
from server.watchdog import Watchdog
from tests.ml.builders_images import encode
from tests.server.builders import Api, api_in_process, api_on_a_socket, make_settings, wait_until
from tests.server.builders_service import add_generation, running_service

RED = encode(Image.new("RGB", (20, 10), (250, 20, 10)))
OPEN = {"/", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/{name}", "/problems/{code}"}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A replica over a migrated database in which nothing was promoted yet."""
    settings = make_settings(tmp_path_factory.mktemp("predictor"), require_keys=True)
    settings.data_directory.mkdir(parents=True)
    app = create_predictor(settings)
    migrate(app.state.services.database)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield Api(app, client, app.state.services)


def test_it_answers_predict_health_and_documentation_and_nothing_else(predictor: Api) -> None:
    paths = {route.path for route in iter_route_contexts(predictor.app.routes)}

    assert paths - OPEN == {"/predict", "/predict/images", "/predict/json"}
    assert predictor.client.get("/api/v1/runs", headers=predictor.key("admin")).json()["code"] == "no_such_route"


@pytest.mark.parametrize("path", ["/predict", "/predict/images", "/predict/json"])
def test_each_way_of_asking_needs_a_key_with_the_scope_predict(predictor: Api, path: str) -> None:
    strange = predictor.client.post(path)
    other = predictor.client.post(path, headers=predictor.key("runs:write", "promote"))
    right = predictor.client.post(path, headers=predictor.key("predict"))

    assert (strange.status_code, other.status_code) == (401, 403)
    assert right.status_code in (422, 503), right.text


def test_its_document_is_a_small_one_of_its_own(predictor: Api) -> None:
    document = predictor.client.get("/openapi.json").json()

    assert document["info"]["title"] == "Noisy Student Predictor"
    assert set(document["paths"]) == {"/predict", "/predict/images", "/predict/json", "/livez", "/readyz", "/metrics", "/problems/{code}"}
    assert [tag["name"] for tag in document["tags"]] == ["predict", "health"]


def test_before_any_promotion_it_is_ready_and_its_numbers_are_its_own(predictor: Api) -> None:
    wait_until(lambda: predictor.client.get("/readyz").status_code == 200)

    numbers = predictor.client.get("/metrics").text
    assert predictor.client.get("/readyz").json()["checks"] == {"database": "ok", "aliases": "ok", "predictor": "ok"}
    assert "noisy_student_aliases_behind 0.0" in numbers
    # What the rows hold is counted by the API, once.
    assert "noisy_student_outbox" not in numbers


def test_over_another_schema_it_is_not_ready(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    settings.data_directory.mkdir(parents=True)
    app = create_predictor(settings)
    with TestClient(app, base_url="http://localhost") as client:
        wait_until(lambda: "does not answer" in client.get("/readyz").json()["checks"]["database"])
        assert client.get("/readyz").status_code == 503

        migrate(app.state.services.database)
        wait_until(lambda: client.get("/readyz").status_code == 200)
        with app.state.services.database.engine().begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
        wait_until(lambda: client.get("/readyz").status_code == 503)

        assert "the database has schema older" in client.get("/readyz").json()["checks"]["database"]


def test_an_api_that_leaves_predict_to_replicas_says_where_and_promotes_all_the_same(tmp_path: Path) -> None:
    with running_service(tmp_path, predict=False, predict_url="https://predict.example") as service:
        generation = add_generation(service)

        promoted = service.promote(generation)
        asked = [service.client.post(path, content=RED) for path in ("/predict", "/predict/json")]

        assert promoted.status_code == 200
        assert service.services.serving.predictor.kept() == []
        assert [(answer.status_code, answer.json()["code"]) for answer in asked] == [(404, "predict_elsewhere")] * 2
        assert asked[0].json()["details"]["url"] == "https://predict.example"
        assert not [path for path in service.client.get("/openapi.json").json()["paths"] if path.startswith("/predict")]


def test_a_generation_that_cannot_be_served_is_not_promoted_by_an_api_that_answers_nothing_either(tmp_path: Path) -> None:
    with running_service(tmp_path, predict=False) as service:
        refused = service.promote(add_generation(service, num_outputs=2))

        assert (refused.status_code, refused.json()["code"]) == (500, "storage_damaged")
        assert service.get("/aliases/production").status_code == 404


def send_slowly(api: Api, key: dict[str, str]) -> socket.socket:
    """A request that was let in, and whose body does not come to its end."""
    url = httpx.URL(api.client.base_url)
    connection = socket.create_connection((url.host, url.port or 80), timeout=20)
    head = f"POST /predict/json HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key['Authorization']}\r\nContent-Length: 10\r\n"
    connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
    connection.sendall(b"half")
    return connection


def test_a_key_with_too_many_requests_open_is_told_so_and_others_are_not(tmp_path: Path) -> None:
    with api_on_a_socket(tmp_path, require_keys=True, predict_in_flight=1) as api:
        one, other = api.key("predict"), api.key("predict")

        def ask(key: dict[str, str]) -> tuple[int, str]:
            answer = api.client.post("/predict", content=RED, headers=key)
            return answer.status_code, answer.json()["code"]

        with send_slowly(api, one):
            assert ask(one) == (429, "too_many_in_flight")
            assert api.client.post("/predict", content=RED, headers=one).headers["retry-after"] == "1"
            assert ask(other) == (503, "nothing_promoted")

        wait_until(lambda: ask(one) == (503, "nothing_promoted"))
        # The one that hung up is counted, and is nobody's defect.
        assert 'route="/predict/json",status="400"' in api.client.get("/metrics").text


def test_a_look_at_the_rows_that_never_returns_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_HUNG_SECONDS", 1.0)
    with api_in_process(tmp_path) as api:
        following = api.services.serving.following
        wait_until(lambda: following.seconds_since_look() < math.inf)
        read, let_go, stuck = following._read, threading.Event(), []

        def read_once_for_ever() -> Any:
            if not stuck:
                stuck.append(threading.current_thread())
                let_go.wait(20)
            return read()

        monkeypatch.setattr(following, "_read", read_once_for_ever)
        wait_until(lambda: stuck)
        began = time.monotonic()
        wait_until(lambda: following.seconds_since_look() < time.monotonic() - began)
        let_go.set()

        wait_until(lambda: not stuck[0].is_alive())
        assert following.check()[0]


def test_a_question_about_a_key_that_hangs_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "ASK_AGAIN_SECONDS", 0.05)
    let_go, answers = threading.Event(), iter([None, Principal("key_1", "host", frozenset({"predict"}))])
    with api_in_process(tmp_path) as api:
        ring = KeyRing(api.database)

        def read(_secret: str) -> Principal | None:
            answer = next(answers)
            if answer is None:
                let_go.wait(20)
            return answer

        monkeypatch.setattr(ring, "_read", read)

        async def ask() -> Principal | None:
            hanging = asyncio.create_task(ring.find("nss_secret"))
            await asyncio.sleep(0.1)
            found = await ring.find("nss_secret")
            let_go.set()
            assert await hanging is None
            return found if await ring.find("nss_secret") == found else None

        found = asyncio.run(ask())

    assert found is not None
    assert found.key_id == "key_1"


class Stuck:
    """Stands in for a generation whose network never returns."""

    id = "gen_stuck"

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def answer(self, _data: bytes, *, queue_seconds: float) -> Any:
        self.let_go.wait(20)
        raise ValueError(queue_seconds)


class Quiet:
    """Aliases that nobody moves."""

    look_in_progress = None

    def keep_looking(self, *, hung: bool) -> None:
        assert not hung


def test_an_image_is_hung_after_so_many_ticks_whatever_the_clock_says_and_livez_tells(tmp_path: Path) -> None:
    with api_in_process(tmp_path) as api:
        service = api.services.serving
        predictor: Predictor = service.predictor
        ended: list[None] = []
        dog = Watchdog(predictor, Quiet(), hung_seconds=3 * watchdog.TICK_SECONDS)  # type: ignore[arg-type]
        dog.on_hung = lambda: ended.append(None)
        stuck = Stuck()
        [future] = predictor.submit([b"image"], stuck)  # type: ignore[arg-type]
        wait_until(predictor.busy_with)

        for _ in range(3):
            dog.tick()
        assert dog.hung is None
        dog.tick()
        service.watchdog, running = dog, service.watchdog
        answer = api.client.get("/livez")
        service.watchdog = running

        assert (answer.status_code, answer.json()["code"]) == (503, "predictor_hung")
        assert ended == [None]
        stuck.let_go.set()
        assert isinstance(future.exception(), ValueError)
        dog.tick()
        assert dog.hung is None
