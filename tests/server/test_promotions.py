"""An alias moves through the gate, with If-Match, without a lost request; and back in one call."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from PIL import Image

from core.db.jobs import NewJob, enqueue
from core.db.tables import Iteration
from core.ids import new_id
from tests.ml.builders_images import encode
from tests.server.builders import add_run
from tests.server.builders_service import Service, add_generation, running_service, set_run

RED = encode(Image.new("RGB", (20, 10), (250, 20, 10)))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path) as running:
        yield running


def code(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["code"]


def answering(service: Service) -> str:
    return str(service.client.post("/predict", content=RED).json()["generation_id"])


def rollback(service: Service, etag: str) -> httpx.Response:
    return service.client.post("/api/v1/aliases/production/rollback", headers={"If-Match": etag})


def test_the_first_promotion_needs_no_incumbent_and_answers_after_the_switch(service: Service) -> None:
    generation = add_generation(service)

    response = service.promote(generation)

    assert (response.status_code, response.headers["etag"]) == (200, '"v1"')
    assert response.json()["generation_id"] == generation
    assert answering(service) == generation


def test_a_move_without_a_precondition_or_with_a_stale_one_is_refused(service: Service) -> None:
    first, second = add_generation(service), add_generation(service)
    path, body = "/api/v1/aliases/production", {"generation": second}
    service.promote(first)

    assert code(service.client.put(path, json=body)) == (428, "precondition_required")
    assert code(service.promote(second, etag='"v7"')) == (412, "precondition_failed")
    assert code(service.promote(second, etag="nonsense")) == (412, "precondition_failed")
    assert code(service.promote(second)) == (412, "precondition_failed")
    assert answering(service) == first


def test_of_two_promotions_with_one_etag_one_wins(service: Service) -> None:
    first, second, third = (add_generation(service) for _ in range(3))
    service.promote(first)

    assert service.promote(second, etag='"v1"').status_code == 200
    assert code(service.promote(third, etag='"v1"')) == (412, "precondition_failed")

    assert answering(service) == second


def test_a_generation_in_training_cannot_be_promoted(service: Service) -> None:
    generation_id = new_id("generation")
    with service.services.database.transaction() as session:
        enqueue(session, [NewJob(kind="train", input={}, generation_id=generation_id)])

    assert code(service.promote(generation_id)) == (409, "not_ready")
    assert code(service.promote("gen_no")) == (422, "invalid_request")


def test_the_gate_refuses_what_is_certainly_worse_and_says_by_how_much(service: Service) -> None:
    good, bad = add_generation(service, num_correct=90), add_generation(service, num_correct=70)
    service.promote(good)

    response = service.promote(bad, etag='"v1"')

    assert code(response) == (409, "gate_refused")
    top1 = response.json()["details"]["comparison"]["top1"]
    assert top1["difference"] == pytest.approx(-0.2)
    assert top1["interval"][1] < 0
    assert answering(service) == good


def test_the_gate_lets_pass_what_is_not_certainly_worse(service: Service) -> None:
    good, close = add_generation(service, num_correct=90), add_generation(service, num_correct=89)
    service.promote(good)

    response = service.promote(close, etag='"v1"')

    assert response.status_code == 200
    newest = service.get("/aliases/production/history").json()["items"][0]
    assert (newest["gate"]["decision"], newest["gate"]["split"], newest["forced"]) == ("passed", "validation", False)
    assert newest["gate"]["latency_seconds"] > 0


def test_force_needs_a_reason_and_is_remembered(service: Service) -> None:
    good, bad = add_generation(service, num_correct=90), add_generation(service, num_correct=70)
    service.promote(good)

    assert code(service.promote(bad, etag='"v1"', force=True)) == (422, "invalid_request")
    assert service.promote(bad, etag='"v1"', force=True, reason="a rehearsal").status_code == 200

    newest = service.get("/aliases/production/history").json()["items"][0]
    assert (newest["forced"], newest["reason"], newest["gate"]["decision"]) == (True, "a rehearsal", "forced-worse")


def test_generations_measured_on_other_images_are_not_compared_in_silence(service: Service) -> None:
    first, other = add_generation(service), add_generation(service, num_correct=50, num_images=60)
    unmeasured = add_generation(service, num_correct=None)
    service.promote(first)

    assert code(service.promote(other, etag='"v1"')) == (409, "gate_refused")
    assert code(service.promote(unmeasured, etag='"v1"')) == (409, "gate_refused")


def test_what_cannot_be_loaded_is_never_pointed_at(service: Service) -> None:
    first, broken = add_generation(service), add_generation(service, num_outputs=2)
    service.promote(first)

    assert code(service.promote(broken, etag='"v1"')) == (500, "storage_damaged")

    assert answering(service) == first
    assert service.get("/aliases/production").json()["version"] == 1


def test_rollbacks_pop_what_promotions_pushed(service: Service) -> None:
    first, second, third = (add_generation(service) for _ in range(3))
    service.promote(first)
    service.promote(second, etag='"v1"')
    service.promote(third, etag='"v2"')

    assert code(service.client.post("/api/v1/aliases/production/rollback")) == (428, "precondition_required")
    assert code(rollback(service, '"v1"')) == (412, "precondition_failed")
    assert rollback(service, '"v3"').json()["generation_id"] == second
    assert answering(service) == second
    assert rollback(service, '"v4"').json()["generation_id"] == first
    assert answering(service) == first
    assert code(rollback(service, '"v5"')) == (409, "conflict")


def test_replaying_the_history_gives_the_alias(service: Service) -> None:
    first, second = add_generation(service), add_generation(service)
    service.promote(first)
    service.promote(second, etag='"v1"')
    rollback(service, '"v2"')

    moves = service.get("/aliases/production/history").json()["items"][::-1]

    assert [(move["version"], move["action"], move["generation_id"]) for move in moves] == [
        (1, "promote", first),
        (2, "promote", second),
        (3, "rollback", first),
    ]
    assert [move["previous_generation_id"] for move in moves] == [None, first, second]
    alias = service.get("/aliases/production").json()
    assert (alias["generation_id"], alias["version"]) == (first, 3)


def test_promoting_what_the_alias_points_at_changes_nothing(service: Service) -> None:
    first = add_generation(service)
    service.promote(first)

    again = service.promote(first, etag='"v1"')

    assert (again.status_code, again.headers["etag"]) == (200, '"v1"')
    assert len(service.get("/aliases/production/history").json()["items"]) == 1


def test_under_load_no_request_fails_and_every_answer_is_its_generations_own(service: Service) -> None:
    # The two disagree about red, so an answer that mixes them would show.
    names = {add_generation(service, num_correct=90): "red", add_generation(service, num_correct=90, rotate=1): "blue"}
    generations = list(names)
    service.promote(generations[0])
    stop = threading.Event()
    answers: list[tuple[int, Any]] = []

    def ask() -> None:
        with httpx.Client(base_url=service.client.base_url, trust_env=False, timeout=30) as client:
            while not stop.is_set():
                response = client.post("/predict", content=RED)
                answers.append((response.status_code, response.json()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for version in range(1, 9):
        service.promote(generations[version % 2], etag=f'"v{version}"').raise_for_status()
        answered = len(answers)
        deadline = time.monotonic() + 20
        while len(answers) < answered + 40:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()

    assert {status for status, _ in answers} == {200}
    assert {(body["generation_id"], body["label"]) for _, body in answers} == set(names.items())


def test_another_replica_and_a_later_start_serve_what_the_alias_says(service: Service) -> None:
    first, second = add_generation(service), add_generation(service)
    service.promote(first)

    with running_service(service.directory) as replica:
        assert answering(replica) == first
        service.promote(second, etag='"v1"')
        deadline = time.monotonic() + 5
        while answering(replica) != second:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_generation_that_something_names_cannot_be_deleted(service: Service) -> None:
    first, second = add_generation(service), add_generation(service)
    child = add_generation(service, teacher=second)
    service.promote(first)

    promoted = service.client.delete(f"/api/v1/generations/{first}")
    taught = service.client.delete(f"/api/v1/generations/{second}")

    assert code(promoted) == (409, "still_referenced")
    assert promoted.json()["details"]["referrers"] == ["alias production", "history of alias production"]
    assert taught.json()["details"]["referrers"] == [f"generation {child}"]


def test_a_generation_that_an_open_runs_recipe_or_plan_names_cannot_be_deleted(service: Service) -> None:
    named, planned = add_generation(service), add_generation(service)
    run, _ = add_run(service.services.database)
    set_run(service, run.id, recipe={"teacher": {"network": {"initial_weights": f"generation:{named}"}}}, status="paused")
    with service.services.database.transaction() as session:
        plan = {"student": {"network": {"initial_weights": f"generation:{planned}"}}}
        session.execute(sa.update(Iteration).where(Iteration.run_id == run.id).values(plan=plan))

    refused = [service.client.delete(f"/api/v1/generations/{one}") for one in (named, planned)]
    set_run(service, run.id, status="completed")
    allowed = [service.client.delete(f"/api/v1/generations/{one}") for one in (named, planned)]

    assert [answer.json()["details"]["referrers"] for answer in refused] == [[f"run {run.id}"]] * 2
    assert [answer.status_code for answer in allowed] == [204, 204]


def test_a_generation_that_nothing_names_is_deleted_and_not_served_any_more(service: Service) -> None:
    generation = add_generation(service)
    pinned = {"generation": generation}
    assert service.client.post("/predict", params=pinned, content=RED).status_code == 200

    assert service.client.delete(f"/api/v1/generations/{generation}").status_code == 204

    assert code(service.get(f"/generations/{generation}")) == (404, "not_found")
    assert code(service.client.post("/predict", params=pinned, content=RED)) == (404, "not_found")
