"""What a worker says of itself, found without torch."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from tests.architecture.sources import REPOSITORY
from tests.architecture.test_imports import TENSORS, modules_after
from workers.announcement import ROOMS, digest_code, find_devices, find_facts


def copy_rooms(directory: Path) -> Path:
    for room in (*ROOMS, "server"):
        shutil.copytree(REPOSITORY / room, directory / room)
    return directory


def test_the_code_digest_changes_with_the_code_that_does_jobs_and_with_nothing_else(tmp_path: Path) -> None:
    rooms = copy_rooms(tmp_path)
    same = digest_code(rooms)

    (rooms / "server" / "app.py").write_text("# another API")
    (rooms / "workers" / "__pycache__").mkdir(exist_ok=True)
    (rooms / "workers" / "__pycache__" / "slots.pyc").write_bytes(b"compiled")
    assert digest_code(rooms) == same == digest_code()

    (rooms / "ml" / "losses.py").write_text("# another loss")
    changed = digest_code(rooms)
    (rooms / "ml" / "losses.py").rename(rooms / "ml" / "losses_2.py")

    assert len({same, changed, digest_code(rooms)}) == 3


def test_a_gpu_is_known_by_name(tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\n")
    (tmp_path / "0000:02:00.0").mkdir()

    assert find_devices(tmp_path) == [
        {"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": None},
        {"kind": "cuda", "name": None, "memory_bytes": None},
    ]


def test_versions_are_read_without_an_import() -> None:
    facts = find_facts(("cpu", "cuda"))

    assert {name: facts[name] for name in ("torch", "timm")} == {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    assert facts["queues"] == ["cpu", "cuda"]
    assert modules_after("workers.announcement", "workers.health") & {*TENSORS, "numpy"} == set()
