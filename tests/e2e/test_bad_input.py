"""Bad input that only a job can find, through the embedded service: a clear error on the job, and nothing lost."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import Service, embedded, wait_until
from tests.e2e.test_whole_loop import RECIPE, wait_for_iteration, write_folders
from tests.ml.builders_images import image_bytes, write_class_folders, write_image

pytestmark = pytest.mark.timeout(900)

QUICK: dict[str, Any] = {
    **RECIPE,
    "teacher": {"training": {"steps": 20, "batch_size": 18, "evaluate_every_steps": 10, "ema_decay": 0.5}},
    "students": [{"training": {"steps": 20, "batch_size": 6, "evaluate_every_steps": 10, "ema_decay": 0.5}}],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_folders(root)
    return root


@pytest.fixture(scope="module")
def service(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with embedded(tmp_path_factory.mktemp("service"), roots=images) as running:
        for name, kind, folder in (("labeled", "labeled", "labeled"), ("pool", "unlabeled", "pool"), ("test", "evaluation", "test")):
            running.register(name, kind, images / folder)
        yield running


def ingest(service: Service, folder: Path, *, kind: str = "labeled") -> dict[str, Any]:
    """Register a folder and read it; the job as it ended, with its version."""
    body = {"name": f"{folder.name}-{kind}", "kind": kind, "source": {"folder": str(folder)}}
    return service.finished_job(service.post("/api/v1/datasets", body)["id"])


def version_of(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    version: dict[str, Any] = service.get(f"/api/v1/dataset-versions/{job['resources']['dataset_version_id']}")
    return version


def start(service: Service, recipe: dict[str, Any], *, iterations: int = 0, **datasets: str) -> str:
    body = {
        "datasets": {"labeled": "labeled", "unlabeled": "pool", "test": "test", **datasets},
        "preset": "digits",
        "recipe": recipe,
        "iterations": iterations,
    }
    return str(service.post("/api/v1/runs", body)["id"])


def ended_run(service: Service, run_id: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        run: dict[str, Any] = service.get(f"/api/v1/runs/{run_id}")
        return run if run["status"] in ("completed", "failed", "canceled") else None

    run: dict[str, Any] = wait_until(over, seconds=200, what=f"the end of run {run_id}")
    return run


def test_an_empty_folder_fails_with_its_name(service: Service, images: Path):
    (images / "empty").mkdir()

    job = ingest(service, images / "empty")

    assert (job["status"], job["error"]["code"]) == ("failed", "data.no_images")
    assert "empty" in job["error"]["message"]
    assert version_of(service, job)["status"] == "failed"


def test_a_class_folder_without_images_fails_with_the_class(service: Service, images: Path):
    write_class_folders(images / "hollow", {"cat": 3, "dog": 3})
    (images / "hollow" / "emu").mkdir()

    job = ingest(service, images / "hollow")

    assert job["status"] == "failed"
    assert "emu" in job["error"]["message"]


def test_one_class_alone_is_refused(service: Service, images: Path):
    write_class_folders(images / "single", {"cat": 5})

    job = ingest(service, images / "single")

    assert (job["status"], job["error"]["code"]) == ("failed", "data.too_few_labels")


def test_broken_files_are_rows_with_a_status_and_the_rest_is_read(service: Service, images: Path):
    folder = write_class_folders(images / "mixed", {"cat": 4, "dog": 4})
    (folder / "cat" / "notes.txt").write_text("not an image", encoding="utf-8")
    (folder / "cat" / "nothing.png").write_bytes(b"")
    (folder / "dog" / "half.png").write_bytes(image_bytes(1)[:60])

    version = version_of(service, ingest(service, folder))

    rows = service.get(f"/api/v1/dataset-versions/{version['id']}/images", limit=100)["items"]
    assert (version["status"], version["num_images"], version["num_usable"]) == ("ready", 11, 8)
    assert {row["key"]: row["status"] for row in rows if row["status"] != "ok"} == {
        "cat/notes.txt": "unsupported",
        "cat/nothing.png": "empty",
        "dog/half.png": "undecodable",
    }


def test_a_class_with_one_image_is_warned_about_at_ingest(service: Service, images: Path):
    version = version_of(service, ingest(service, write_class_folders(images / "lonely", {"cat": 4, "dog": 1})))

    assert version["status"] == "ready"
    assert "dog" in json.dumps(version["report"]["warnings"])


def test_links_that_lead_out_of_the_folder_are_refused(service: Service, images: Path, tmp_path: Path):
    folder = write_class_folders(images / "linked", {"cat": 3, "dog": 3})
    outside = write_image(tmp_path / "secret.png", 7)
    (folder / "cat" / "secret.png").symlink_to(outside)

    job = ingest(service, folder)

    assert job["status"] == "failed"
    assert "secret.png" in job["error"]["message"]


def test_when_nothing_survives_selection_the_run_ends_with_the_histogram_and_a_suggestion(service: Service):
    run_id = start(service, {**QUICK, "selection": {"min_confidence": 0.0, "max_confidence": 0.001}}, iterations=1)

    run = ended_run(service, run_id)

    assert (run["status"], run["error"]["code"]) == ("failed", "selection.nothing_selected")
    assert run["error"]["message"] == "no image survives selection; raise max_confidence from 0.001, or leave it out"
    failed = service.get(f"/api/v1/jobs/{run['error']['job_id']}")
    assert sum(map(sum, failed["error"]["details"]["histogram"]["counts"].values())) > 0
    assert run["iterations"][0]["generation_id"], "generation 0 is kept"


def test_when_a_whole_class_does_not_survive_selection_the_run_says_which(service: Service, images: Path):
    for number in range(40):
        write_image(images / "reds" / f"{number}.png", 5000 + number, hue=2)
    ingest(service, images / "reds", kind="unlabeled")
    recipe = {**QUICK, "teacher": RECIPE["teacher"], "selection": {"require_every_class": True, "near_duplicate_distance": None}}

    run = ended_run(service, start(service, recipe, iterations=1, unlabeled="reds-unlabeled"))

    assert (run["status"], run["error"]["code"]) == ("failed", "selection.nothing_selected")
    assert "blue" in run["error"]["message"] or "green" in run["error"]["message"]
    assert run["error"]["message"].endswith("or switch require_every_class off")
    details = service.get(f"/api/v1/jobs/{run['error']['job_id']}")["error"]["details"]
    assert set(details["classes"]) <= {"blue", "green"}
    assert sum(details["histogram"]["counts"]["red"]) > 0


def test_a_loss_that_is_no_number_ends_with_step_loss_and_learning_rate(service: Service):
    # The rate climbs; from about step 40 on each step makes the weights larger.
    training = {
        "steps": 400,
        "optimizer": {"name": "sgd", "learning_rate": 10.0, "weight_decay": 1.0},
        "schedule": {"name": "cosine", "warmup_ratio": 0.5},
        "checkpoint_every_seconds": 0.05,
    }
    recipe = {**QUICK, "teacher": {"training": {**QUICK["teacher"]["training"], **training}}}

    run = ended_run(service, start(service, recipe))

    job = service.get(f"/api/v1/jobs/{run['error']['job_id']}")
    assert (run["status"], job["error"]["code"], job["attempt"]) == ("failed", "training.diverged", 1)
    details = job["error"]["details"]
    assert details["step"] > 0
    assert details["learning_rate"] > 0
    assert details["loss"]
    kept = Path(details["checkpoint"])
    assert kept.exists(), "the last good checkpoint is kept"


def test_an_image_size_that_the_network_cannot_take_fails_and_names_both(service: Service):
    recipe = {**QUICK, "image": {"size": 8, "small_images": True, "padding": 1}}
    recipe["teacher"] = {**QUICK["teacher"], "network": {"architecture": "vit_tiny_patch16_224"}}

    run = ended_run(service, start(service, recipe))

    job = service.get(f"/api/v1/jobs/{run['error']['job_id']}")
    assert (run["status"], job["error"]["class"], job["attempt"]) == ("failed", "permanent", 1)
    assert "8 x 8" in job["error"]["message"]
    assert "vit_tiny_patch16_224" in job["error"]["message"]


def test_a_pool_smaller_than_the_cap_is_refused_before_anything_starts(service: Service):
    body = {
        "datasets": {"labeled": "labeled", "unlabeled": "pool", "test": "test"},
        "preset": "digits",
        "recipe": {**QUICK, "selection": {"cap_per_class": 1000}},
        "iterations": 1,
    }

    problem = service.client.post("/api/v1/runs", json=body)

    assert problem.status_code == 422
    assert "1000" in problem.json()["detail"]


@pytest.fixture(scope="module")
def exported(service: Service, images: Path) -> Path:
    """A generation's files as a person would download them, below the roots."""
    run_id = start(service, QUICK)
    generation_id = wait_for_iteration(service, run_id, 0)["generation_id"]
    folder = images / "exported"
    folder.mkdir()
    for file in service.get(f"/api/v1/generations/{generation_id}")["files"]:
        (folder / file["name"]).write_bytes(service.client.get(f"/api/v1/generations/{generation_id}/files/{file['name']}").content)
    return folder


def import_folder(service: Service, folder: Path, *, class_names: list[str] | None = None) -> dict[str, Any]:
    body = {"folder": str(folder), "name": folder.name, "class_names": class_names}
    return service.finished_job(service.post("/api/v1/generations/import", body)["id"])


def copy_of(exported: Path, name: str) -> Path:
    folder = exported.parent / name
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_exported_generation_can_be_imported_again(service: Service, exported: Path):
    job = import_folder(service, exported)

    assert job["status"] == "succeeded", job
    imported = service.get(f"/api/v1/generations/{job['resources']['generation_id']}")
    assert (imported["role"], imported["class_names"]) == ("imported", ["blue", "green", "red"])


def test_imported_weights_with_another_class_list_are_refused(service: Service, exported: Path):
    job = import_folder(service, exported, class_names=["cat", "dog", "emu"])

    assert (job["status"], job["error"]["code"]) == ("failed", "data.class_mismatch")


def test_a_damaged_safetensors_is_refused(service: Service, exported: Path):
    folder = copy_of(exported, "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    job = import_folder(service, folder)

    assert (job["status"], job["error"]["code"]) == ("failed", "weights.unusable")


def test_a_pickle_offered_as_weights_is_refused_and_never_loaded(service: Service, exported: Path, tmp_path: Path):
    folder = copy_of(exported, "pickled")
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "loaded"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))

    job = import_folder(service, folder)

    assert (job["status"], job["error"]["code"]) == ("failed", "weights.unusable")
    assert not proof.exists()


def test_after_all_of_this_the_invariants_hold(service: Service):
    service.verify()
