"""Who opens which door, by the import statements and by what a started process really holds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.architecture.sources import REPOSITORY, room_sources

TENSORS = ("torch", "timm", "torchvision")
FACE = (
    "config",
    "cores",
    "errors",
    "events",
    "manifest",
    "recipes",
    "recipes.architectures",
    "runtimes",
    "schedules",
    "self_training",
    "tasks",
    "validation",
)

# Each outside door and the only modules that may open it.
DOORS = {
    "onnxruntime": {"server.predictor", "ml.export"},
    "safetensors": {"ml.models", "ml.export"},
    "celery": {"core.queue", "workers.app", "workers.tasks"},
    "kombu": {"core.queue"},
    "boto3": {"core.storage.s3"},
    "botocore": {"core.storage.s3", "ml.objects", "ml.object_errors"},
    # The doctor knocks on every door to say which one stays shut.
    "redis": {"core.queue", "cli.doctor"},
}


def importers_of(name: str) -> set[str]:
    return {
        source.module
        for source in room_sources()
        if any(imported == name or imported.startswith(f"{name}.") for imported in source.imports)
    }


@pytest.mark.parametrize("door", DOORS)
def test_an_outside_door_is_opened_by_its_own_modules_only(door: str) -> None:
    assert importers_of(door) <= DOORS[door]


def test_only_ml_models_uses_timms_model_side() -> None:
    # `import timm` brings create_model within reach, so the bare import counts; `from timm.optim import ...` does not.
    bare = {source.module for source in room_sources() if "timm" in source.imports}

    assert bare | importers_of("timm.models") <= {"ml.models"}


def modules_after(*imports: str) -> set[str]:
    """Top-level modules that a fresh process holds after these imports."""
    code = f"import {', '.join(imports)}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NOISY_STUDENT_", "COV_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=clean, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_mls_face_is_plain_python() -> None:
    loaded = modules_after(*(f"ml.{name}" for name in FACE))

    assert loaded & {*TENSORS, "numpy", "PIL", "pyarrow", "pydantic"} == set()


def test_the_ring_loads_pillow_and_numpy_but_no_tensors() -> None:
    loaded = modules_after("ml.pixels")

    assert loaded & {*TENSORS, "pyarrow", "onnxruntime"} == set()


def test_the_supervisor_holds_neither_tensors_nor_arrays_nor_the_web() -> None:
    loaded = modules_after("workers.supervisor", "workers.housekeeping", "workers.controller")

    assert loaded & {*TENSORS, "numpy", "pyarrow", "PIL", "fastapi", "starlette", "uvicorn", "boto3", "botocore"} == set()


def test_the_api_holds_no_tensors() -> None:
    loaded = modules_after("server.app")

    assert loaded & {*TENSORS, "onnx", "onnxscript", "celery", "alembic", "pyarrow", "sklearn", "boto3", "botocore"} == set()


def test_migrations_import_alembic_and_sqlalchemy_only() -> None:
    used = {name.split(".")[0] for source in room_sources("migrations") for name in source.imports}

    assert used - sys.stdlib_module_names == {"alembic", "sqlalchemy"}
