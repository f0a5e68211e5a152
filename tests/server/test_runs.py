"""POST /runs refuses what cannot work before anything is written, and each refusal points at what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from PIL import Image

from core.db.tables import Iteration, Job, Run
from ml.recipes import merge_config
from tests.ml.builders_images import image_bytes, write_class_folders, write_flat_folder
from tests.server.builders_service import Service, add_dataset, add_generation, running_service, set_run

CLASSES = {"blue": 4, "green": 4, "red": 4}
SMALL: dict[str, Any] = {
    "teacher": {"training": {"batch_size": 4, "steps": 10}},
    "students": [{"training": {"batch_size": 4, "steps": 10}}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with ready datasets: labeled, pool (40 images), validation, test. Tests add rows of their own beside them."""
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder) as service:
        add_dataset(service, "labeled", "labeled", write_class_folders(folder / "labeled", CLASSES))
        add_dataset(service, "pool", "unlabeled", write_flat_folder(folder / "pool", 40, first=100))
        add_dataset(service, "validation", "evaluation", write_class_folders(folder / "validation", CLASSES, first=200))
        add_dataset(service, "test", "evaluation", write_class_folders(folder / "test", CLASSES, first=300))
        yield service


def ask(service: Service, *, datasets: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None, **body: Any) -> httpx.Response:
    references = {"labeled": "labeled", "unlabeled": "pool", "validation": "validation", "test": "test"} | (datasets or {})
    return service.post("/runs", {"datasets": references, "recipe": merge_config(SMALL, recipe or {}), **body})


def refusal(response: httpx.Response, status: int, code: str, pointer: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    assert [error["pointer"] for error in problem.get("errors", [])] == ([] if pointer is None else [pointer])
    return problem


def num_runs(service: Service) -> int:
    with service.services.database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Run)) or 0


def test_a_run_is_accepted_with_its_first_job_and_its_complete_recipe(data: Service) -> None:
    response = ask(data, name="colors", iterations=2, priority=100)

    assert response.status_code == 202, response.text
    run = response.json()
    assert response.headers["location"] == f"/api/v1/runs/{run['id']}"
    assert response.headers["retry-after"] == "1"
    assert (run["name"], run["status"], run["iterations_wanted"], run["priority"]) == ("colors", "active", 2, 100)
    assert run["recipe"]["teacher"]["training"]["batch_size"] == 4
    assert run["recipe"]["selection"]["min_confidence"] == 0.3
    assert [iteration["phase"] for iteration in run["iterations"]] == ["training"]
    assert run["iterations"][0]["jobs"] == run["jobs"]
    assert data.get(f"/runs/{run['id']}").json() == run
    assert data.get(f"/jobs/{run['jobs'][0]}").json().items() >= {"step": "train-teacher", "priority": 100}.items()


def test_a_pool_that_holds_a_test_file_is_refused_with_both_keys(data: Service) -> None:
    folder = write_flat_folder(data.directory / "leaky-pool", 5, first=400)
    shutil.copy(data.directory / "test" / "red" / "00308.png", folder / "copied.png")
    add_dataset(data, "leaky-pool", "unlabeled", folder)
    before = num_runs(data)

    problem = refusal(ask(data, datasets={"unlabeled": "leaky-pool"}), 422, "leakage", "/datasets/test")

    [found] = problem["details"]["keys"]
    assert found == {"key": "red/00308.png", "evaluation": "test", "other_key": "copied.png", "other": "unlabeled", "by": "file"}
    assert problem["details"]["num_keys"] == 1
    assert num_runs(data) == before


def test_labeled_pixels_of_a_validation_image_in_another_file_format_are_refused(data: Service) -> None:
    folder = write_class_folders(data.directory / "leaky", CLASSES)
    with Image.open(data.directory / "validation" / "blue" / "00200.png") as image:
        image.save(folder / "blue" / "other.bmp")
    add_dataset(data, "leaky", "labeled", folder)

    problem = refusal(ask(data, datasets={"labeled": "leaky"}), 422, "leakage", "/datasets/validation")

    [found] = problem["details"]["keys"]
    assert (found["key"], found["other_key"], found["other"], found["by"]) == ("blue/00200.png", "blue/other.bmp", "labeled", "pixels")


def test_validation_images_cannot_be_test_images_too(data: Service) -> None:
    problem = refusal(ask(data, datasets={"test": "validation"}), 422, "leakage", "/datasets/test")

    assert problem["details"]["num_keys"] == 12
    found = problem["details"]["keys"][0]
    assert (found["evaluation"], found["other"], found["key"]) == ("test", "validation", found["other_key"])


def test_what_two_versions_share_can_be_asked_before_a_run(data: Service) -> None:
    folder = write_flat_folder(data.directory / "sharing", 3, first=5000)
    shutil.copy(data.directory / "test" / "red" / "00308.png", folder / "copied.png")
    add_dataset(data, "sharing", "unlabeled", folder)

    one = data.get("/dataset-versions/sharing/leakage", params={"with": "test"}).json()
    other = data.get("/dataset-versions/test/leakage", params={"with": "sharing:1"}).json()

    assert one == {"num": 1, "items": [{"key": "copied.png", "other_key": "red/00308.png", "by": "file"}]}
    assert other == {"num": 1, "items": [{"key": "red/00308.png", "other_key": "copied.png", "by": "file"}]}
    assert data.get("/dataset-versions/pool/leakage", params={"with": "test"}).json() == {"num": 0, "items": []}


def test_initial_weights_are_read_from_below_the_roots_only(data: Service, tmp_path: Path) -> None:
    inside = data.directory / "weights"
    inside.mkdir()
    recipe = {"teacher": {"network": {"initial_weights": f"local-dir:{tmp_path}"}}}
    pointer = "/recipe/teacher/network/initial_weights"

    refusal(ask(data, recipe=recipe), 422, "folder_refused", pointer)
    recipe["teacher"]["network"]["initial_weights"] = f"local-dir:{inside}"
    run = ask(data, recipe=recipe, iterations="manual")

    assert run.status_code == 202, run.text
    finish_iteration_0(data, run.json()["id"], add_generation(data))
    inside.rmdir()
    network = {"network": {"initial_weights": "local-dir:/etc"}}
    answer = data.post(f"/runs/{run.json()['id']}/iterations", {"student": network})
    refusal(answer, 422, "folder_refused", "/student/network/initial_weights")


def test_a_hundred_leaking_keys_are_listed_and_all_are_counted(data: Service) -> None:
    folder = write_class_folders(data.directory / "many", {"blue": 40, "green": 40, "red": 40}, first=1000)
    flat = data.directory / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        shutil.copy(path, flat / path.name)
    add_dataset(data, "many", "evaluation", folder)
    add_dataset(data, "flat", "unlabeled", flat)

    problem = refusal(ask(data, datasets={"test": "many", "unlabeled": "flat"}), 422, "leakage", "/datasets/test")

    assert problem["details"]["num_keys"] == 120
    assert len(problem["details"]["keys"]) == 100


def test_evaluation_classes_must_be_the_labeled_ones(data: Service) -> None:
    add_dataset(data, "other", "evaluation", write_class_folders(data.directory / "other", {"blue": 2, "green": 2, "yellow": 2}, first=500))

    problem = refusal(ask(data, datasets={"test": "other"}), 422, "invalid_request", "/datasets/test")

    assert problem["details"] == {"missing": ["red"], "foreign": ["yellow"]}


def test_a_dataset_that_is_still_read_cannot_be_used(data: Service) -> None:
    add_dataset(data, "unread", "unlabeled", data.directory / "pool", ready=False)

    problem = refusal(ask(data, datasets={"unlabeled": "unread"}), 409, "not_ready", "/datasets/unlabeled")

    assert "pending" in problem["detail"]


@pytest.mark.parametrize(("role", "reference"), [("unlabeled", "labeled"), ("labeled", "pool"), ("test", "labeled")])
def test_each_role_needs_its_kind_of_dataset(data: Service, role: str, reference: str) -> None:
    refusal(ask(data, datasets={role: reference}), 422, "invalid_request", f"/datasets/{role}")


def test_a_dataset_that_does_not_exist_is_pointed_at(data: Service) -> None:
    refusal(ask(data, datasets={"labeled": "nothing"}), 422, "invalid_request", "/datasets/labeled")
    refusal(ask(data, datasets={"labeled": "labeled:7"}), 422, "invalid_request", "/datasets/labeled")


@pytest.mark.parametrize(
    ("recipe", "code", "pointer"),
    [
        ({"selection": {"min_confidense": 0.5}}, "invalid_recipe", "/recipe/selection/min_confidense"),
        ({"selection": {"min_confidence": 1.5}}, "invalid_recipe", "/recipe/selection/min_confidence"),
        ({"selection": {"min_confidence": "high"}}, "invalid_recipe", "/recipe/selection/min_confidence"),
        ({"image": {"size": 7}}, "invalid_recipe", "/recipe/image/size"),
        ({"teacher": {"network": {"architecture": "resnet-18"}}}, "unknown_architecture", "/recipe/teacher/network/architecture"),
        ({"teacher": {"network": {"initial_weights": "timm:resnet18"}}}, "invalid_recipe", "/recipe/teacher/network/initial_weights"),
        ({"teacher": {"network": {"initial_weights": "teacher"}}}, "invalid_recipe", "/recipe/teacher/network/initial_weights"),
        ({"teacher": {"network": {"initial_weights": "generation:no"}}}, "invalid_request", "/recipe/teacher/network/initial_weights"),
        ({"teacher": {"training": {"batch_size": 64}}}, "invalid_request", "/recipe/teacher/training/batch_size"),
        ({"students": [{"training": {"batch_size": 13}}]}, "invalid_request", "/recipe/students/0/training/batch_size"),
        ({"selection": {"cap_per_class": 41}}, "invalid_request", "/recipe/selection/cap_per_class"),
        ({"selection": {"min_confidence_of": {"emu": 0.2}}}, "invalid_request", "/recipe/selection/min_confidence_of"),
        ({"labeling": {"selection_model": "generation:no"}}, "invalid_request", "/recipe/labeling/selection_model"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_at_its_field(data: Service, recipe: dict[str, Any], code: str, pointer: str) -> None:
    before = num_runs(data)

    refusal(ask(data, recipe=recipe), 422, code, pointer)

    assert num_runs(data) == before


def test_an_unknown_preset_names_the_known_ones(data: Service) -> None:
    problem = refusal(ask(data, preset="digit"), 422, "invalid_request", "/preset")

    assert "digits" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"datasets": {}, "recipe": {"students": [{}, {"ratio": NaN}]}}', "/recipe/students/1/ratio"),
        (b'{"recipe": {"selection": {"min_confidence": 1e999}}}', "/recipe/selection/min_confidence"),
        (b'{"datasets": {"labeled": "a", "labeled": "b"}}', "/datasets/labeled"),
        (b'{"datasets": {"labeled": "labeled"', ""),
    ],
)
def test_json_that_says_two_things_or_nothing_is_refused(data: Service, body: bytes, pointer: str) -> None:
    response = data.client.post("/api/v1/runs", content=body, headers={"content-type": "application/json"})

    refusal(response, 422, "invalid_request", pointer)


def test_without_validation_a_class_with_one_labeled_image_is_refused(data: Service) -> None:
    folder = write_class_folders(data.directory / "lonely", {"blue": 8, "green": 8, "red": 1}, first=700)
    add_dataset(data, "lonely", "labeled", folder)

    problem = refusal(ask(data, datasets={"labeled": "lonely", "validation": None}), 422, "invalid_request", "/datasets/labeled")

    assert problem["details"]["classes"] == ["red"]


def test_one_idempotency_key_starts_one_run(data: Service) -> None:
    headers = {"Idempotency-Key": "once"}
    before = num_runs(data)
    body = {"datasets": {"labeled": "labeled", "unlabeled": "pool"}, "recipe": SMALL}

    first = data.post("/runs", body, headers=headers)
    again = data.post("/runs", body, headers=headers)
    other = data.post("/runs", body | {"iterations": 1}, headers=headers)

    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    refusal(other, 409, "idempotency_mismatch", None)
    assert num_runs(data) == before + 1


def test_an_initial_generation_takes_generation_0s_place(data: Service) -> None:
    generation = add_generation(data)

    run = ask(data, initial_generation=generation, iterations=1).json()

    assert run["jobs"] == []
    assert (run["iterations"][0]["phase"], run["iterations"][0]["generation_id"]) == ("done", generation)


@pytest.mark.parametrize("class_names", [("blue", "green", "yellow"), ("red", "green", "blue")])
def test_an_initial_generation_must_guess_the_labeled_classes_in_their_order(data: Service, class_names: tuple[str, ...]) -> None:
    generation = add_generation(data, class_names=class_names)

    refusal(ask(data, initial_generation=generation), 422, "invalid_request", "/initial_generation")


def test_an_initial_generation_in_training_is_not_ready(data: Service) -> None:
    run = ask(data).json()
    training = data.get(f"/jobs/{run['jobs'][0]}").json()["resources"]["generation_id"]

    refusal(ask(data, initial_generation=training), 409, "not_ready", None)


def test_runs_are_listed_newest_first_in_pages(data: Service) -> None:
    ids = [ask(data).json()["id"] for _ in range(3)]

    first = data.get("/runs", params={"limit": 2}).json()
    second = data.get("/runs", params={"limit": 2, "cursor": first["next_cursor"]}).json()

    assert [run["id"] for run in first["items"] + second["items"]][:3] == ids[::-1]
    assert data.get("/runs", params={"status": "failed"}).json() == {"items": [], "next_cursor": None}


def test_a_paused_run_resumes_and_a_canceled_one_takes_its_jobs_along(data: Service) -> None:
    run = ask(data).json()["id"]

    assert data.post(f"/runs/{run}/pause").json()["status"] == "paused"
    assert data.post(f"/runs/{run}/resume").json()["status"] == "active"
    canceled = data.post(f"/runs/{run}/cancel").json()
    again = data.post(f"/runs/{run}/cancel")

    assert (canceled["status"], canceled["jobs"], canceled["iterations"][0]["phase"]) == ("canceled", [], "canceled")
    assert again.status_code == 200
    refusal(data.post(f"/runs/{run}/resume"), 409, "wrong_state", None)
    with data.services.database.reading() as session:
        assert set(session.scalars(sa.select(Job.status).where(Job.run_id == run))) == {"canceled"}


def test_a_completed_run_can_be_extended_but_not_resumed(data: Service) -> None:
    run = ask(data, iterations=3).json()["id"]
    set_run(data, run, status="completed", stop_reason="iterations.done")

    refusal(data.post(f"/runs/{run}/resume"), 409, "wrong_state", None)
    extended = data.post(f"/runs/{run}/extend", {"iterations": 2})

    assert extended.status_code == 202
    # Two more than it made are wanted now.
    assert (extended.json()["status"], extended.json()["iterations_wanted"], extended.json()["stop_reason"]) == ("active", 2, None)


def test_a_run_that_its_gain_rule_ended_is_not_extended_but_sent_to_iterations(data: Service) -> None:
    run = ask(data, iterations=3).json()["id"]
    set_run(data, run, status="completed", stop_reason="validation.gain")

    problem = refusal(data.post(f"/runs/{run}/extend", {"iterations": 2}), 409, "wrong_state", None)

    assert f"POST /api/v1/runs/{run}/iterations" in problem["detail"]
    assert data.get(f"/runs/{run}").json()["status"] == "completed"


def finish_iteration_0(service: Service, run_id: str, generation_id: str) -> None:
    with service.services.database.transaction() as session:
        for job in session.scalars(sa.select(Job).where(Job.run_id == run_id)):
            job.status = "succeeded"
        iteration = session.scalars(sa.select(Iteration).where(Iteration.run_id == run_id)).one()
        iteration.phase, iteration.generation_id = "done", generation_id


def test_one_more_iteration_may_name_teacher_ratio_noise_and_pool(data: Service) -> None:
    run = ask(data, iterations="manual").json()["id"]
    own, other = add_generation(data), add_generation(data)
    finish_iteration_0(data, run, own)
    set_run(data, run, status="completed")
    add_dataset(data, "larger", "unlabeled", write_flat_folder(data.directory / "larger", 50, first=2000))

    body = {"teacher": other, "ratio": 2, "noise": {"dropout": 0.25}, "unlabeled": "larger"}
    response = data.post(f"/runs/{run}/iterations", body)

    assert response.status_code == 202, response.text
    iteration = response.json()
    assert (iteration["number"], iteration["phase"], iteration["teacher_generation_id"]) == (1, "labeling", other)
    assert (iteration["plan"]["student"]["ratio"], iteration["plan"]["student"]["noise"]["dropout"]) == (2, 0.25)
    assert iteration["plan"]["student"]["training"]["batch_size"] == 4
    after = data.get(f"/runs/{run}").json()
    assert (after["status"], after["iterations_wanted"]) == ("active", 1)
    labels = data.get(f"/pseudo-label-sets/{iteration['pseudo_label_set_id']}").json()
    assert (labels["status"], labels["num_images"], labels["jobs"]) == ("labeling", 50, iteration["jobs"])
    refusal(data.post(f"/runs/{run}/iterations", {}), 409, "wrong_state", None)


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({"noise": {"dropouts": 0.5}}, "invalid_recipe", "/noise/dropouts"),
        ({"student": {"noise": {"dropout": 2}}}, "invalid_recipe", "/student/noise/dropout"),
        ({"student": {"network": {"architecture": "resnet-18"}}}, "unknown_architecture", "/student/network/architecture"),
        ({"student": {"training": {"batch_size": 64}}}, "invalid_request", "/student/training/batch_size"),
        ({"ratio": 0}, "invalid_request", "/ratio"),
        ({"teacher": "gen_no"}, "invalid_request", "/teacher"),
        ({"unlabeled": "labeled"}, "invalid_request", "/unlabeled"),
        ({"ratios": 1}, "invalid_request", "/ratios"),
    ],
)
def test_an_iteration_that_cannot_work_is_refused_at_its_field(data: Service, body: dict[str, Any], code: str, pointer: str) -> None:
    run = ask(data, iterations="manual").json()["id"]
    finish_iteration_0(data, run, add_generation(data))

    refusal(data.post(f"/runs/{run}/iterations", body), 422, code, pointer)


def test_a_newer_pool_may_not_leak_either(data: Service) -> None:
    run = ask(data, iterations="manual").json()["id"]
    finish_iteration_0(data, run, add_generation(data))
    folder = write_flat_folder(data.directory / "newer", 5, first=3000)
    (folder / "leak.png").write_bytes(image_bytes(300, hue=0))
    add_dataset(data, "newer", "unlabeled", folder)

    refusal(data.post(f"/runs/{run}/iterations", {"unlabeled": "newer"}), 422, "leakage", "/datasets/test")


def test_the_lineage_tells_accuracies_and_aliases(data: Service) -> None:
    run = ask(data, iterations="manual").json()["id"]
    generation = add_generation(data, num_correct=90)
    finish_iteration_0(data, run, generation)
    data.promote(generation)

    [entry] = data.get(f"/runs/{run}/lineage").json()["generations"]

    assert (entry["iteration"], entry["generation_id"], entry["aliases"]) == (0, generation, ["production"])
    assert entry["test"] == {"top1": 0.9, "interval": [0.8, 0.95], "num_images": 100}


def test_a_runs_events_are_numbered_in_its_own_count(data: Service) -> None:
    run = ask(data).json()["id"]

    page = data.get(f"/runs/{run}/events").json()

    assert [(event["number"], event["kind"]) for event in page["items"]] == [(1, "queued")]
    assert page["status"] == "active"
