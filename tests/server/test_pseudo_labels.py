"""Pseudo-label sets and generations as they are read: counts, histograms, guesses by confidence, images, files, comparisons."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.db.files import name_files
from core.db.pseudo_labels import finish_set, list_shards
from core.db.tables import Job
from ml import objects
from tests.builders_services import S3Server, wait_until
from tests.ml.builders_images import image_bytes, write_class_folders, write_flat_folder
from tests.ml.builders_sources import write_tars
from tests.server.builders_service import COLORS, Service, add_dataset, add_generation, running_service

REPORT = {
    "num_pool": 6,
    "num_usable": 5,
    "num_eligible": 5,
    "removed_duplicates": {"equal": 0, "near": 0, "examples": []},
    "target": 2,
    "num_unique": 2,
    "num_rows": 4,
    "classes": [
        {
            "name": name,
            "predicted": 2,
            "above_threshold": 1,
            "num_unique": 1,
            "num_rows": 2,
            "lowest_confidence": 0.5,
            "best_confidence": 0.9,
        }
        for name in COLORS
    ],
    "histogram": {"edges": [round(edge / 20, 2) for edge in range(21)], "counts": {name: [0] * 19 + [2] for name in COLORS}},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder) as running:
        pool = write_flat_folder(folder / "pool", 5, first=100)
        (pool / "00105.png").write_bytes(b"no image")
        add_dataset(running, "pool", "unlabeled", pool)
        add_dataset(running, "test", "evaluation", write_class_folders(folder / "test", dict.fromkeys(COLORS, 2)))
        yield running


def create(service: Service, **body: Any) -> httpx.Response:
    return service.post("/pseudo-label-sets", {"generation": add_generation(service), "unlabeled": "pool", **body})


def finish(service: Service, set_id: str) -> None:
    """Leave what a selection job leaves: guesses in falling confidence, then the image without one."""
    table = pa.table(
        {
            "key": [f"0010{number}.png" for number in (3, 1, 0, 4, 2, 5)],
            "status": ["ok"] * 5 + ["unsupported"],
            "class": pa.array([2, 0, 2, 1, 0, None], pa.int16()),
            "confidence": pa.array([*np.array([0.9, 0.8, 0.7, 0.5, 0.4], np.float16), None], pa.float16()),
            "repeat": pa.array([2, 2, 0, 0, 0, 0], pa.int32()),
        }
    )
    path = service.directory / f"{set_id}.parquet"
    pq.write_table(table, path, row_group_size=2)
    with service.services.database.transaction() as session:
        finish_set(session, set_id, files={"items.parquet": service.services.storage.put(path)}, report=REPORT)


@pytest.fixture(scope="module")
def ready(service: Service) -> str:
    set_id = str(create(service).json()["id"])
    finish(service, set_id)
    return set_id


def keys(service: Service, set_id: str, **params: Any) -> list[str]:
    return [item["key"] for item in service.get(f"/pseudo-label-sets/{set_id}/items", params=params).json()["items"]]


def test_a_pool_is_labeled_by_any_generation_one_job_a_shard(service: Service) -> None:
    response = create(service, labeling={"shard_size": 4}, selection={"min_confidence": 0.5}, seed=7, evaluation=["test"])

    assert response.status_code == 202, response.text
    view = response.json()
    assert response.headers["location"] == f"/api/v1/pseudo-label-sets/{view['id']}"
    assert (view["status"], view["num_shards"], view["shards_done"], view["num_images"], len(view["jobs"])) == ("labeling", 2, 0, 6, 2)
    assert (view["selection"]["min_confidence"], view["selection"]["balance"], view["seed"]) == (0.5, True, 7)
    with service.services.database.transaction() as session:
        job = session.get_one(Job, view["jobs"][1])
        assert (job.input["start"], job.input["stop"]) == (4, 6)
        job.status = "succeeded"
        session.flush()
        assert list_shards(session, view["id"], purpose="label") == [(job.id, None)]
    assert service.get(f"/pseudo-label-sets/{view['id']}").json()["shards_done"] == 1


def test_a_sets_jobs_have_its_priority(service: Service) -> None:
    made = create(service, labeling={"shard_size": 2}, priority=-100).json()

    jobs = [service.get(f"/jobs/{job_id}").json() for job_id in made["jobs"]]

    assert made["priority"] == -100
    assert [job["priority"] for job in jobs] == [-100] * 3


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"generation": "gen_no"}, "/generation"),
        ({"priority": 101}, "/priority"),
        ({"unlabeled": "nothing"}, "/unlabeled"),
        ({"unlabeled": "test"}, "/unlabeled"),
        ({"evaluation": ["pool"]}, "/evaluation/0"),
        ({"labeling": {"shards": 2}}, "/labeling/shards"),
        ({"selection": {"min_confidence": 2}}, "/selection/min_confidence"),
        ({"selection": {"min_confidence_of": {"emu": 0.2}}}, "/selection/min_confidence_of"),
        ({"labeling": {"selection_model": "generation:gen_no"}}, "/labeling/selection_model"),
    ],
)
def test_a_set_that_cannot_be_made_is_refused_at_its_field(service: Service, body: dict[str, Any], pointer: str) -> None:
    response = create(service, **body)

    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == pointer


def test_a_set_that_is_not_ready_has_no_counts(service: Service) -> None:
    set_id = create(service).json()["id"]

    for part in ("counts", "histogram", "items"):
        response = service.get(f"/pseudo-label-sets/{set_id}/{part}")
        assert (response.status_code, response.json()["code"]) == (409, "not_ready")


def test_counts_and_histogram_are_selections_report(service: Service, ready: str) -> None:
    counts = service.get(f"/pseudo-label-sets/{ready}/counts").json()
    histogram = service.get(f"/pseudo-label-sets/{ready}/histogram").json()

    assert (counts["num_unique"], counts["num_rows"], [row["name"] for row in counts["classes"]]) == (2, 4, list(COLORS))
    assert (len(histogram["edges"]), [len(row["counts"]) for row in histogram["classes"]]) == (21, [20, 20, 20])


def test_guesses_come_most_confident_first_in_pages(service: Service, ready: str) -> None:
    path = f"/pseudo-label-sets/{ready}/items"

    first = service.get(path, params={"limit": 3}).json()
    second = service.get(path, params={"limit": 3, "cursor": first["next_cursor"]}).json()

    items = first["items"] + second["items"]
    assert [item["key"] for item in items] == [f"0010{number}.png" for number in (3, 1, 0, 4, 2, 5)]
    assert [item["class_name"] for item in items] == ["red", "blue", "red", "green", "blue", None]
    assert [item["selected"] for item in items] == [True, True, False, False, False, False]
    assert items[0]["confidence"] == pytest.approx(0.9, abs=1e-3)
    assert second["next_cursor"] is None


def test_guesses_are_filtered_by_class_confidence_and_selection(service: Service, ready: str) -> None:
    assert keys(service, ready, **{"class": "blue"}) == ["00101.png", "00102.png"]
    assert keys(service, ready, min_confidence=0.5, max_confidence=0.8) == ["00100.png", "00104.png"]
    assert keys(service, ready, selected=True) == ["00103.png", "00101.png"]
    assert keys(service, ready, selected=False, **{"class": "red"}) == ["00100.png"]
    assert service.get(f"/pseudo-label-sets/{ready}/items", params={"class": "mauve"}).status_code == 422


def test_a_cursor_of_other_filters_is_refused(service: Service, ready: str) -> None:
    path = f"/pseudo-label-sets/{ready}/items"
    cursor = service.get(path, params={"limit": 1}).json()["next_cursor"]

    assert service.get(path, params={"cursor": cursor, "selected": True}).status_code == 422


def test_a_guesss_image_is_the_file_byte_for_byte(service: Service, ready: str) -> None:
    [item, *_] = service.get(f"/pseudo-label-sets/{ready}/items").json()["items"]

    response = service.client.get(item["image"])

    assert response.content == (service.directory / "pool" / item["key"]).read_bytes()
    assert response.headers["content-type"] == "image/png"


def test_what_is_no_image_is_given_out_for_saving_only(service: Service, ready: str) -> None:
    response = service.get(f"/pseudo-label-sets/{ready}/items/00105.png/image")

    assert (response.headers["content-type"], response.headers["content-disposition"]) == ("application/octet-stream", "attachment")
    assert service.get(f"/pseudo-label-sets/{ready}/items/../../secret/image").status_code == 404


def test_a_changed_image_is_not_passed_off_as_the_labeled_one(service: Service) -> None:
    add_dataset(service, "changing", "unlabeled", write_flat_folder(service.directory / "changing", 2))
    set_id = create(service, unlabeled="changing").json()["id"]
    (service.directory / "changing" / "10000.png").write_bytes(image_bytes(1))

    response = service.get(f"/pseudo-label-sets/{set_id}/items/10000.png/image")

    assert (response.status_code, response.json()["code"]) == (409, "conflict")


def test_two_generations_are_compared_image_by_image(service: Service) -> None:
    worse, better = add_generation(service, num_correct=70), add_generation(service, num_correct=90)

    compared = service.get(f"/generations/{better}/compare", params={"with": worse, "split": "test"}).json()

    assert (compared["a"], compared["b"], compared["num_images"]) == (worse, better, 100)
    assert compared["top1"]["difference"] == pytest.approx(0.2)
    assert service.get(f"/generations/{better}/compare", params={"with": add_generation(service, num_correct=None)}).status_code == 409


def test_a_generations_files_are_what_was_exported(service: Service) -> None:
    generation = add_generation(service)

    names = [row["name"] for row in service.get(f"/generations/{generation}").json()["files"]]
    file = service.get(f"/generations/{generation}/files/class_names.json")

    assert {"model.onnx", "model.safetensors", "preprocessing.json"} <= set(names)
    assert json.loads(file.content) == list(COLORS)
    assert service.get(f"/generations/{generation}/files/no").status_code == 404


def test_an_import_is_a_job_and_its_folder_lies_below_the_roots(service: Service) -> None:
    folder = service.directory / "weights"
    folder.mkdir()

    accepted = service.post("/generations/import", {"folder": str(folder), "name": "mine"})
    outside = service.post("/generations/import", {"folder": str(Path("/etc")), "name": "mine"})

    assert (accepted.status_code, accepted.json()["kind"]) == (202, "import")
    assert accepted.json()["resources"]["generation_id"].startswith("gen_")
    assert (outside.status_code, outside.json()["code"]) == (422, "folder_refused")
    assert outside.json()["errors"][0]["pointer"] == "/folder"


def test_a_batch_prediction_is_a_job_for_one_generation_and_one_dataset(service: Service) -> None:
    generation = add_generation(service)

    accepted = service.post("/batch-predictions", {"generation": generation, "dataset": "pool"})
    neither = service.post("/batch-predictions", {"dataset": "pool"})
    nothing = service.post("/batch-predictions", {"alias": "nothing", "dataset": "pool"})
    items = service.get(f"/batch-predictions/{accepted.json()['id']}/items")

    assert (accepted.status_code, accepted.json()["kind"]) == (202, "predict")
    assert (neither.status_code, nothing.status_code) == (422, 422)
    assert nothing.json()["errors"][0]["pointer"] == "/alias"
    assert (items.status_code, items.json()["code"]) == (409, "not_ready")


def test_a_batch_predictions_items_are_read_in_pages(service: Service) -> None:
    job_id = service.post("/batch-predictions", {"generation": add_generation(service), "dataset": "pool"}).json()["id"]
    rows = {
        "key": ["a.png", "b.png", "c.txt"],
        "status": ["ok", "ok", "unsupported"],
        "class_name": ["red", "blue", None],
        "confidence": pa.array([0.75, 0.5, None], pa.float32()),
        "top_class_names": [["red", "blue"], ["blue", "red"], None],
        "top_probs": pa.array([[0.75, 0.25], [0.5, 0.5], None], pa.list_(pa.float32())),
    }
    path = service.directory / "predictions.parquet"
    pq.write_table(pa.table(rows), path)
    with service.services.database.transaction() as session:
        session.get_one(Job, job_id).status = "succeeded"
        name_files(session, job_id, {"predictions.parquet": service.services.storage.put(path)})

    first = service.get(f"/batch-predictions/{job_id}/items", params={"limit": 2}).json()
    second = service.get(f"/batch-predictions/{job_id}/items", params={"limit": 2, "cursor": first["next_cursor"]}).json()

    assert first["items"][0]["top"] == [{"label": "red", "probability": 0.75}, {"label": "blue", "probability": 0.25}]
    assert [item["key"] for item in first["items"] + second["items"]] == rows["key"]
    assert second["items"][0] == {"key": "c.txt", "status": "unsupported", "class_name": None, "confidence": None, "top": []}


def test_a_pool_whose_folder_is_gone_says_so(service: Service) -> None:
    add_dataset(service, "gone", "unlabeled", write_flat_folder(service.directory / "gone", 2))
    set_id = create(service, unlabeled="gone").json()["id"]
    shutil.rmtree(service.directory / "gone")

    assert service.get(f"/pseudo-label-sets/{set_id}/items/10000.png/image").status_code == 409


def test_a_pool_image_is_shown_from_the_middle_of_its_shard(service: Service) -> None:
    folder = write_flat_folder(service.directory / "flat", 3)
    tars = write_tars(folder, service.directory / "tars", shards=1)
    add_dataset(service, "tars", "unlabeled", tars)
    set_id = create(service, unlabeled="tars").json()["id"]
    address = f"/pseudo-label-sets/{set_id}/items/10001.png/image"

    found = service.get(address)

    assert (found.content, found.headers["content-type"]) == ((folder / "10001.png").read_bytes(), "image/png")
    shard = tars / "shard-000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"ihdr"))
    assert service.get(address).status_code == 409


def test_a_pool_image_is_shown_from_a_bucket(tmp_path: Path, s3_server: S3Server) -> None:
    name = f"pool-{uuid4().hex}"
    s3_server.make_bucket(name)
    folder = write_flat_folder(tmp_path / "flat", 3)
    write_tars(folder, s3_server.directory / name / "tars", shards=1)
    key = {"dataset_s3_access_key_id": s3_server.access_key, "dataset_s3_secret_access_key": s3_server.secret_key}
    with running_service(tmp_path, dataset_s3_endpoint_url=s3_server.url, **key) as service:
        add_dataset(service, "tars", "unlabeled", f"s3://{name}/tars")
        address = f"/pseudo-label-sets/{create(service, unlabeled='tars').json()['id']}/items/10001.png/image"

        found = service.get(address)
        (s3_server.directory / name / "tars" / "shard-000.tar").unlink()
        wait_until(lambda: service.get(address).status_code == 409, what="the shard's absence")
        objects.use(objects.Access(endpoint_url="http://127.0.0.1:1", access_key_id="a", secret_access_key="b", attempts=1))
        away = service.get(address)
        objects.use(objects.Access())

    assert (found.content, found.headers["content-type"]) == ((folder / "10001.png").read_bytes(), "image/png")
    assert (away.status_code, away.json()["code"]) == (503, "store_away")
