"""A running API on a migrated SQLite file, and rows that look as if workers had made them. Networks are real and tiny."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import uvicorn
from onnx import TensorProto, helper, numpy_helper

from core.db import jobs
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.generations import register_generation
from core.db.jobs import NewJob, enqueue
from core.db.schema import migrate
from core.db.session import Database
from core.db.tables import Run
from core.ids import new_id
from core.settings import Settings
from core.storage import Storage
from ml.evaluation import write_predictions
from ml.ingestion import scan
from ml.pixels import Preprocessing
from server.app import create_app
from server.dependencies import Services

COLORS = ("blue", "green", "red")
PREPROCESSING = Preprocessing(
    size=8, crop_ratio=1.0, small_images=True, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)


@dataclass(frozen=True, slots=True)
class Service:
    """The API behind real HTTP, and what it stands on."""

    client: httpx.Client
    services: Services
    directory: Path

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(f"/api/v1{path}", json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(f"/api/v1{path}", **options)

    def promote(self, generation_id: str, *, etag: str | None = None, **body: Any) -> httpx.Response:
        headers = {"If-None-Match": "*"} if etag is None else {"If-Match": etag}
        return self.client.put("/api/v1/aliases/production", json={"generation": generation_id, **body}, headers=headers)


@contextmanager
def running_service(directory: Path, **settings: Any) -> Iterator[Service]:
    """Start the API on a free port of this machine, without keys unless they are asked for."""
    defaults: dict[str, Any] = {"data_directory": directory / "data", "require_keys": False, "dataset_roots": (directory,)}
    options = Settings(**(defaults | settings))
    options.data_directory.mkdir(parents=True, exist_ok=True)
    app = create_app(options)
    migrate(app.state.services.database)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none", lifespan="on"))
    thread = threading.Thread(target=server.run, name="api")
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield Service(client, app.state.services, directory)
    finally:
        server.should_exit = True
        thread.join()


def add_dataset(service: Service, name: str, kind: Any, folder: Path | str, *, ready: bool = True) -> str:
    """Register a folder as a worker would leave it; its version's id."""
    with service.services.database.transaction() as session:
        version, _ = add_version(session, create_dataset(session, name=name, kind=kind), source={"folder": str(folder)}, ingest=False)
        if ready:
            manifest, report = scan(folder, kind=kind)
            path = service.directory / f"{version.id}.parquet"
            manifest.write(path)
            facts = service.services.storage.put(path) | {
                "num_images": len(manifest),
                "num_usable": len(manifest.usable()),
                "class_names": list(manifest.class_names),
            }
            finish_version(session, version.id, manifest=facts, report=report)
        return version.id


def write_color_network(path: Path, *, scale: float, rotate: int = 0, num_outputs: int = 3) -> None:
    """An ONNX network that tells the strongest color of an image; `rotate` makes it name the next class instead, wrongly."""
    # Rows: blue, green, red; columns: the channels red, green, blue.
    weights = np.roll(np.eye(3, dtype=np.float32)[::-1] * scale, rotate, axis=0)[:num_outputs]
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "weights"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "colors",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", num_outputs])],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def write_generation_files(
    folder: Path, *, num_correct: int | None, num_images: int, scale: float, rotate: int, temperature: float, num_outputs: int
) -> None:
    """What an export leaves, with a color network; `num_correct` validation images of `num_images` are right, None leaves them out."""
    folder.mkdir(parents=True)
    write_color_network(folder / "model.onnx", scale=scale, rotate=rotate, num_outputs=num_outputs)
    (folder / "model.safetensors").write_bytes(f"{folder.name} {scale} {rotate}".encode())
    (folder / "preprocessing.json").write_text(json.dumps(PREPROCESSING.to_dict()))
    (folder / "class_names.json").write_text(json.dumps(COLORS))
    (folder / "calibration.json").write_text(json.dumps({"temperature": temperature}))
    if num_correct is not None:
        labels = np.arange(num_images) % 3
        guesses = np.where(np.arange(num_images) < num_correct, labels, (labels + 1) % 3)
        logits = np.eye(3, dtype=np.float32)[guesses] * 5
        keys = [f"{number:05}.png" for number in range(num_images)]
        for name in ("validation", "test"):
            path = folder / f"{name}_predictions.parquet"
            write_predictions(path, keys, labels, logits, class_names=COLORS, temperature=1.0)


def add_generation(
    service: Service,
    *,
    num_correct: int | None = 90,
    num_images: int = 100,
    scale: float = 10.0,
    rotate: int = 0,
    temperature: float = 2.0,
    num_outputs: int = 3,
    class_names: Sequence[str] = COLORS,
    teacher: str | None = None,
    run_id: str | None = None,
) -> str:
    """Register a generation as a finished job would; its id."""
    generation_id = new_id("generation")
    folder = service.directory / generation_id
    write_generation_files(
        folder, num_correct=num_correct, num_images=num_images, scale=scale, rotate=rotate, temperature=temperature, num_outputs=num_outputs
    )
    measured = None if num_correct is None else {"top1": num_correct / num_images, "interval": [0.8, 0.95], "num_images": num_images}
    metrics = {"role": "teacher", "architecture": "colors", "num_parameters": 9, "validation": measured, "test": measured}
    files = {path.name: service.services.storage.put(path) for path in folder.iterdir()}
    with service.services.database.transaction() as session:
        wanted = NewJob(kind="train", input={"teacher_generation_id": teacher}, generation_id=generation_id, run_id=run_id)
        [job] = enqueue(session, [wanted])
        job.status = "succeeded"
        session.flush()
        register_generation(session, job, {"files": files, "metrics": metrics, "class_names": list(class_names)})
    return generation_id


def register_network(database: Database, storage: Storage, folder: Path, *, name: str, class_names: Sequence[str] = COLORS) -> str:
    """A folder of an exported network as an imported generation, with the history that a job of its own would have left; its id."""
    files = {path.relative_to(folder).as_posix(): storage.put(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    metrics = {"role": "imported", "architecture": "colors", "num_parameters": 9, "validation": None, "test": None}
    generation_id = new_id("generation")
    wanted = NewJob(kind="import", input={"folder": str(folder), "name": name}, generation_id=generation_id)
    with database.transaction() as session:
        enqueue(session, [wanted])
        claimed = jobs.claim(session, holder="builder", capabilities=["cpu"], lease_seconds=60, job_id=wanted.id)
        assert claimed is not None
        done = jobs.succeed(session, wanted.id, token=claimed.token, result={"generation_id": generation_id})
        assert done is not None
        register_generation(session, done, {"files": files, "metrics": metrics, "class_names": list(class_names)})
    return generation_id


def set_run(service: Service, run_id: str, **values: Any) -> None:
    """Change a run's row as the iteration controller would."""
    with service.services.database.transaction() as session:
        run = session.get_one(Run, run_id)
        for name, value in values.items():
            setattr(run, name, value)
