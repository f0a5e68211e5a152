"""The main job over HTTP, embedded and as a fleet: the same test, because it is the same code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import Place, Service, embedded, fleet, follow, start_celery_worker, wait_until
from tests.ml.builders_images import write_class_folders, write_image

pytestmark = pytest.mark.timeout(900)

RECIPE = {
    "teacher": {"training": {"steps": 60, "batch_size": 18, "evaluate_every_steps": 30, "ema_decay": 0.9}},
    "students": [{"training": {"steps": 60, "batch_size": 6, "evaluate_every_steps": 30, "ema_decay": 0.9}}],
    "labeling": {"shard_size": 32},
    "selection": {"require_every_class": False, "near_duplicate_distance": None},
    "iterations": {"control": False},
    "runtime": {"num_threads": 1, "num_loader_workers": 0},
}
POOL = 96


def write_folders(root: Path) -> dict[str, Path]:
    """Three classes told apart by their color: 12 labeled and 8 test images each, and a flat pool."""
    counts = {"blue": 12, "green": 12, "red": 12}
    write_class_folders(root / "labeled", counts)
    write_class_folders(root / "test", dict.fromkeys(counts, 8), first=1000)
    for number in range(POOL):
        write_image(root / "pool" / f"{number:04d}.png", 2000 + number, hue=number % 3)
    return {name: root / name for name in ("labeled", "pool", "test")}


def start_run(
    service: Service, folders: Mapping[str, Place], *, iterations: int | str, recipe: dict[str, Any] | None = None
) -> dict[str, Any]:
    service.register("labeled", "labeled", folders["labeled"])
    service.register("pool", "unlabeled", folders["pool"])
    service.register("test", "evaluation", folders["test"])
    body = {
        "name": "colors",
        "datasets": {"labeled": "labeled", "unlabeled": "pool", "test": "test"},
        "preset": "digits",
        "recipe": recipe or RECIPE,
        "iterations": iterations,
    }
    run: dict[str, Any] = service.post("/api/v1/runs", body, headers={"Idempotency-Key": "one-run"})
    assert service.post("/api/v1/runs", body, headers={"Idempotency-Key": "one-run"})["id"] == run["id"]
    return run


def wait_for_iteration(service: Service, run_id: str, number: int, *, seconds: float = 240) -> dict[str, Any]:
    def done() -> dict[str, Any] | None:
        run = service.get(f"/api/v1/runs/{run_id}")
        assert run["status"] in ("active", "completed"), run
        iterations = [iteration for iteration in run["iterations"] if iteration["number"] == number]
        return iterations[0] if iterations and iterations[0]["phase"] == "done" else None

    iteration: dict[str, Any] = wait_until(done, seconds=seconds, what=f"iteration {number} of {run_id}")
    return iteration


def check_events(service: Service, run_id: str) -> None:
    """Cut the stream, come back with Last-Event-ID: every event once, in order, the same as the pages tell."""
    path = f"/api/v1/runs/{run_id}/events"
    first = follow(service, path, stop=lambda event: event["id"] is not None and event["id"] >= 5)
    last = first[-1]["id"]
    newest = service.get(path, after=0, limit=1000)["items"][-1]["number"]
    rest = follow(service, path, after=last, stop=lambda event: event["id"] is not None and event["id"] >= newest)

    ids = [event["id"] for event in first + rest if event["id"] is not None]
    assert ids == list(range(1, ids[-1] + 1))
    assert ids[-1] >= newest


def check_set(service: Service, set_id: str) -> None:
    row = service.get(f"/api/v1/pseudo-label-sets/{set_id}")
    counts = service.get(f"/api/v1/pseudo-label-sets/{set_id}/counts")
    histogram = service.get(f"/api/v1/pseudo-label-sets/{set_id}/histogram")
    items = service.get(f"/api/v1/pseudo-label-sets/{set_id}/items", limit=20)["items"]

    assert row["status"] == "ready"
    assert (row["num_images"], row["shards_done"]) == (POOL, 3)
    assert counts
    assert histogram
    confidences = [item["confidence"] for item in items]
    assert confidences == sorted(confidences, reverse=True)
    image = service.client.get(f"/api/v1/pseudo-label-sets/{set_id}/items/{items[0]['key']}/image")
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")


def promote(service: Service, generation_id: str, **headers: str) -> Any:
    return service.client.put("/api/v1/aliases/production", json={"generation": generation_id}, headers=headers)


def check_promotions(service: Service, folders: dict[str, Path], first: str, second: str) -> None:
    """Promote generation 1, then 2 with If-Match; /predict names it; rolled back it names 1."""
    image = next((folders["test"] / "red").iterdir()).read_bytes()

    def predicted_by() -> tuple[str, str]:
        answer = service.client.post("/predict?top_k=2", content=image, headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 200, answer.text
        return answer.json()["generation_id"], answer.json()["label"]

    before = service.client.post("/predict", content=image, headers={"Content-Type": "application/octet-stream"})
    assert before.status_code == 503
    assert promote(service, first).status_code == 428
    created = promote(service, first, **{"If-None-Match": "*"})
    assert created.status_code == 200, created.text
    assert predicted_by()[0] == first

    etag = service.client.get("/api/v1/aliases/production").headers["etag"]
    moved = promote(service, second, **{"If-Match": etag})
    assert moved.status_code == 200, moved.text
    assert predicted_by() == (second, "red")
    assert promote(service, first, **{"If-Match": etag}).status_code == 412

    etag = service.client.get("/api/v1/aliases/production").headers["etag"]
    back = service.client.post("/api/v1/aliases/production/rollback", headers={"If-Match": etag})
    assert back.status_code == 200, back.text
    assert predicted_by()[0] == first


def whole_loop(service: Service, folders: dict[str, Path], *, between: Callable[[str], None] = lambda _run_id: None) -> dict[str, Any]:
    """The main job; what came of it, down to the bits of the weights."""
    run = start_run(service, folders, iterations="manual")
    wait_for_iteration(service, run["id"], 0)

    service.post(f"/api/v1/runs/{run['id']}/iterations", {})
    service.post(f"/api/v1/runs/{run['id']}/iterations", {}, status=409)
    first = wait_for_iteration(service, run["id"], 1)
    service.post(f"/api/v1/runs/{run['id']}/iterations", {"ratio": 2, "noise": {"dropout": 0.05}})
    between(run["id"])
    second = wait_for_iteration(service, run["id"], 2)

    check_events(service, run["id"])
    check_set(service, second["pseudo_label_set_id"])
    check_promotions(service, folders, first["generation_id"], second["generation_id"])
    assert second["plan"]["student"]["ratio"] == 2
    service.verify()
    return {
        number: {
            "generation": service.get(f"/api/v1/generations/{iteration['generation_id']}")["digest"],
            "counts": service.get(f"/api/v1/pseudo-label-sets/{iteration['pseudo_label_set_id']}/counts"),
            "histogram": service.get(f"/api/v1/pseudo-label-sets/{iteration['pseudo_label_set_id']}/histogram"),
        }
        for number, iteration in ((1, first), (2, second))
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole loop, embedded, with nothing killed; ended by Ctrl-C."""
    directory = tmp_path_factory.mktemp("embedded")
    folders = write_folders(directory / "images")
    with embedded(directory, roots=directory / "images") as service:
        outcome = whole_loop(service, folders)
        exit_code = service.processes.terminate("up")
    return {"outcome": outcome, "exit_code": exit_code}


def test_the_whole_loop_runs_embedded(undisturbed: dict[str, Any]):
    assert undisturbed["exit_code"] == 0
    assert undisturbed["outcome"][1]["generation"] != undisturbed["outcome"][2]["generation"]


def test_a_fleet_that_loses_a_worker_and_its_broker_memory_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, postgresql_url: str, redis_url: str, undisturbed: dict[str, Any]
):
    folders = write_folders(tmp_path / "images")

    with fleet(
        tmp_path, roots=tmp_path / "images", database_url=postgresql_url, redis_url=redis_url, NOISY_STUDENT_LEASE_SECONDS="6"
    ) as service:

        def lose_a_worker(run_id: str) -> None:
            import redis

            def trainer() -> str | None:
                for job in service.get("/api/v1/jobs", run_id=run_id, status="running")["items"]:
                    if job["kind"] in ("label", "train"):
                        events = service.get(f"/api/v1/jobs/{job['id']}/events", after=0)["items"]
                        return str([event for event in events if event["kind"] == "started"][-1]["data"]["worker"])
                return None

            holder = wait_until(trainer, seconds=60, what="a running job")
            victim = next(name for name in ("worker-1", "worker-2") if holder in service.processes.log(name))
            service.processes.kill(victim)
            with redis.Redis.from_url(redis_url) as broker:
                broker.flushall()
            start_celery_worker(service.processes, f"{victim}-again")

        outcome = whole_loop(service, folders, between=lose_a_worker)

        assert outcome == undisturbed["outcome"]
        logs = "".join(path.read_text(errors="replace") for path in tmp_path.glob("worker-*.log"))
        woken = re.findall(r"task\.woke_job", logs)
        assert woken, "no log line says which Celery task woke which job"


@pytest.mark.long
def test_a_run_with_a_control_reports_it_beside_the_student(tmp_path: Path):
    folders = write_folders(tmp_path / "images")

    with embedded(tmp_path, roots=tmp_path / "images") as service:
        run = start_run(service, folders, iterations=1, recipe={**RECIPE, "iterations": {"control": True}})
        wait_until(lambda: service.get(f"/api/v1/runs/{run['id']}")["status"] == "completed", seconds=240, what="the run")
        iteration = wait_for_iteration(service, run["id"], 1)
        student = service.get(f"/api/v1/generations/{iteration['generation_id']}")["metrics"]
        control = service.get(f"/api/v1/generations/{iteration['control_generation_id']}")["metrics"]

        assert (control["role"], control["steps"], control["images_seen"]) == ("control", student["steps"], student["images_seen"])
