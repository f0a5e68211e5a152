"""Predictor replicas follow promotions, survive what happens to processes, database and files, and say how they are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from core.db.files import list_files
from tests.builders_services import wait_until
from tests.ml.builders_images import encode
from tests.server import builders_service
from tests.server.builders_replicas import Callers, Fleet, Replica, passed, running_fleet
from tests.server.builders_service import add_generation

RED = encode(Image.new("RGB", (20, 10), (250, 20, 10)))
FOLLOWED_SECONDS = 5.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, postgresql: str) -> Iterator[Fleet]:
    """An API and two replicas."""
    with running_fleet(tmp_path_factory.mktemp("fleet"), postgresql) as running:
        running.promote(add_generation(running.service))
        with running.replica() as first, running.replica() as second:
            running.replicas.extend((first, second))
            yield running


@pytest.fixture
def new(fleet: Fleet) -> str:
    """A generation that nobody has loaded yet."""
    return add_generation(fleet.service)


def answering(replica: Replica) -> str:
    answer = replica.ask(RED)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generation_id"])


def test_a_promotion_is_followed_by_every_replica_within_five_seconds(fleet: Fleet, new: str) -> None:
    fleet.promote(new)

    wait_until(lambda: {answering(replica) for replica in fleet.replicas} == {new}, seconds=FOLLOWED_SECONDS, what="the switch")


def test_a_replica_that_was_frozen_asks_the_rows_before_it_answers(fleet: Fleet, new: str) -> None:
    sleeper, other = fleet.replicas
    answering(sleeper)
    with ThreadPoolExecutor(8) as callers:
        with sleeper.frozen():
            fleet.promote(new)
            wait_until(lambda: answering(other) == new, seconds=FOLLOWED_SECONDS)
            wait_until(passed(3.3))
            # They lie in the sockets when it wakes up, before any of its threads can have looked at the rows.
            waiting = [callers.submit(answering, sleeper) for _ in range(8)]
            wait_until(passed(0.3))
        answers = {future.result() for future in waiting}

    assert answers == {new}


def test_promotions_under_load_fail_no_request_and_each_answer_is_its_generations_own(fleet: Fleet) -> None:
    # They disagree about red, so an answer that mixes them would show.
    names = {add_generation(fleet.service): "red", add_generation(fleet.service, rotate=1): "blue"}
    fleet.promote(next(iter(names)))
    wait_until(lambda: {answering(replica) for replica in fleet.replicas} <= set(names))

    with Callers(4, fleet.replicas, RED, pause_seconds=0.01) as callers:
        for generation in [*names][::-1] * 2:
            fleet.promote(generation)
            wait_until(lambda wanted=generation: {answering(replica) for replica in fleet.replicas} == {wanted}, seconds=FOLLOWED_SECONDS)

    assert {status for status, _, _ in callers.answers} == {200}
    assert {(body["generation_id"], body["label"]) for _, body, _ in callers.answers} == set(names.items())


def test_without_the_database_the_generation_in_memory_goes_on_answering_known_keys(fleet: Fleet, new: str) -> None:
    replica = fleet.replicas[0]
    before = answering(replica)

    with fleet.database_away():
        # Longer than keys and rows are believed without a look.
        with Callers(2, [replica], RED, pause_seconds=0.05) as callers:
            wait_until(passed(6))
        status, checks = replica.readiness()
        stranger = replica.client.post("/predict", content=RED, headers={"Authorization": "Bearer nss_unknown"})
    fleet.promote(new)

    assert {(status, body.get("generation_id")) for status, body, _ in callers.answers} == {(200, before)}
    assert (status, stranger.status_code) == (200, 503)
    assert "the database does not answer" in checks["database"]
    wait_until(lambda: answering(replica) == new, seconds=FOLLOWED_SECONDS, what="the switch after the outage")
    assert "alias.not_followed" in replica.log.read_text()


def test_a_database_that_says_nothing_holds_requests_up_once(fleet: Fleet) -> None:
    replica = fleet.replicas[0]
    before = answering(replica)

    with fleet.database_silent():
        with Callers(2, [replica], RED, pause_seconds=0.05) as callers:
            wait_until(passed(9))
        slow = [seconds for _, _, seconds in callers.answers if seconds > 1.8]

    assert {(status, body["generation_id"]) for status, body, _ in callers.answers} == {(200, before)}
    # Each of the two callers waits once for rows and once for its key.
    assert len(slow) <= 4
    assert max(slow) < 5


@pytest.fixture(params=["storage", "warm-up"])
def unloadable(request: pytest.FixtureRequest, fleet: Fleet, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A generation that cannot be loaded, and what makes it loadable, if anything does."""
    if request.param == "warm-up":
        yield add_generation(fleet.service, num_outputs=2), None
        return
    generation = add_generation(fleet.service, scale=9.0)
    with fleet.service.services.database.reading() as session:
        [digest] = [row.digest for row in list_files(session, generation) if row.name == "model.onnx"]
    stored = fleet.service.services.storage.fetch(digest)
    aside = stored.rename(tmp_path / "model.onnx")
    yield generation, lambda: aside.rename(stored)


def test_what_cannot_be_loaded_leaves_the_old_generation_answering_and_is_told(fleet: Fleet, unloadable: tuple[str, Any], new: str) -> None:
    generation, repair = unloadable
    replica = fleet.replicas[0]
    before, failures = answering(replica), replica.metric("noisy_student_alias_failures_total")

    fleet.move_row(generation)
    wait_until(lambda: replica.metric("noisy_student_alias_failures_total") > failures, what="a failed load")
    status, checks = replica.readiness()

    assert (answering(replica), status) == (before, 200)
    assert f"generation {generation}" in checks["alias production"]
    assert "cannot be loaded" in checks["alias production"]
    assert replica.metric("noisy_student_aliases_behind") == 1
    assert generation in replica.log.read_text()
    if repair is None:
        fleet.move_row(new)
    else:
        repair()
    wait_until(lambda: answering(replica) == (new if repair is None else generation), what="the switch")
    assert replica.readiness() == (200, {"database": "ok", "aliases": "ok", "alias production": "ok", "predictor": "ok"})
    assert replica.metric("noisy_student_aliases_behind") == 0


def write_trap(path: Path, **_: Any) -> None:
    """A network that counts to 10^15 for a bright image, and to nothing for a black one, such as warm-up shows it."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["goes_on"]), helper.make_node("Add", ["counted", "one"], ["counts"])],
        "count",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("counted", TensorProto.FLOAT, ["batch", 3]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("counts", TensorProto.FLOAT, ["batch", 3]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "many"], ["product"]),
        helper.make_node("Cast", ["product"], ["turns"], to=TensorProto.INT64),
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Loop", ["turns", "yes", "flat"], ["logits"], body=body),
    ]
    constants = {"many": np.float32(1e15), "one": np.float32(1), "yes": np.bool_(True)}
    graph = helper.make_graph(
        nodes,
        "trap",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def test_a_replica_whose_predictor_hangs_ends_itself_to_be_started_anew(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders_service, "write_color_network", write_trap)
    trap = add_generation(fleet.service)

    with fleet.replica(PREDICT_HUNG_SECONDS="1", PREDICT_THREADS="2") as replica:
        with pytest.raises(Exception, match="disconnected"):
            replica.ask(RED, generation=trap)
        code = replica.process.wait(20)

    assert code == 70
    assert "predictor.hung" in replica.log.read_text()


@pytest.mark.long
def test_fivefold_overload_is_refused_and_what_is_accepted_keeps_its_deadline(fleet: Fleet) -> None:
    deadline, queue, threads = 2.0, 8, 1
    large = encode(Image.new("RGB", (3000, 3000), (250, 20, 10)), "JPEG")
    limits = {"PREDICT_QUEUE": str(queue), "PREDICT_THREADS": str(threads), "PREDICT_DEADLINE_SECONDS": str(deadline)}

    with fleet.replica(**limits) as replica:
        with Callers(queue + threads, [replica], large):
            wait_until(passed(1))
        memory = resident_bytes(replica)
        with Callers(5 * (queue + threads), [replica], large) as callers:
            wait_until(passed(2.5))
        grown = resident_bytes(replica) - memory

    answered = [body for status, body, _ in callers.answers if status == 200]
    refused = [body for status, body, _ in callers.answers if status == 503]
    assert len(answered) + len(refused) == len(callers.answers)
    assert answered
    assert refused
    assert {body["code"] for body in refused} == {"overloaded"}
    assert max(body["timings_ms"]["queue"] for body in answered) <= 1000 * deadline
    assert grown < 40e6


def resident_bytes(replica: Replica) -> int:
    status = Path(f"/proc/{replica.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024
