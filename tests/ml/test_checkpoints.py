"""Checkpoints survive damage, kills and full disks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ml.checkpoints import CheckpointFolder, load_checkpoint, save_checkpoint
from ml.errors import CheckpointDamaged


def build_state(step: int) -> dict[str, object]:
    optimizer = {"state": {0: {"momentum_buffer": torch.full((3,), float(step))}}, "param_groups": [{"lr": 0.1, "foreach": None}]}
    return {"step": step, "learner": {"network": {"w": torch.full((100, 100), float(step))}, "optimizer": optimizer}, "best": None}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = build_state(7)
    state["strided"] = torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last)

    save_checkpoint(tmp_path / "a.ckpt", state)
    found = load_checkpoint(tmp_path / "a.ckpt")

    assert found["step"] == 7
    assert torch.equal(found["strided"], state["strided"])  # type: ignore[arg-type]
    assert found["learner"]["optimizer"]["param_groups"] == [{"lr": 0.1, "foreach": None}]
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, place: float) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, build_state(1))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointDamaged, match="cut short or was changed"):
        load_checkpoint(path)


@pytest.mark.parametrize("size", [0, 10, 20_000])
def test_a_file_that_is_cut_short_is_noticed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, build_state(1))
    os.truncate(path, size)

    with pytest.raises(CheckpointDamaged):
        load_checkpoint(path)


def test_when_the_last_is_damaged_the_one_before_is_used_with_its_own_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "digest")
    folder.save_best(10, {"w": torch.tensor(10.0)})
    folder.save_last(build_state(10), best_step=10)
    folder.save_best(20, {"w": torch.tensor(20.0)})
    folder.save_last(build_state(20), best_step=20)
    os.truncate(folder.last, 100)

    again = CheckpointFolder(tmp_path, "digest")
    state, damaged = again.load_last()

    assert state is not None
    assert state["step"] == 10
    assert again.load_best(state["best_step"])["w"] == 10
    assert len(damaged) == 1


def test_a_state_whose_best_is_damaged_is_not_used(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "digest")
    folder.save_last(build_state(5), best_step=None)
    folder.save_best(10, {"w": torch.tensor(10.0)})
    folder.save_last(build_state(10), best_step=10)
    os.truncate(tmp_path / "best-000000010.ckpt", 50)

    state, damaged = CheckpointFolder(tmp_path, "digest").load_last()

    assert state is not None
    assert state["step"] == 5
    assert len(damaged) == 1


def test_when_everything_is_damaged_the_training_begins_anew(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "digest")
    for step in (1, 2):
        folder.save_last(build_state(step), best_step=None)
    os.truncate(folder.last, 10)
    os.truncate(folder.previous, 10)

    state, damaged = CheckpointFolder(tmp_path, "digest").load_last()

    assert state is None
    assert len(damaged) == 2
    assert CheckpointFolder(tmp_path, "digest").load_last() == (None, [])


def test_the_checkpoint_of_another_recipe_is_refused_and_left_alone(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path, "one").save_last(build_state(1), best_step=None)

    with pytest.raises(CheckpointDamaged, match="another recipe"):
        CheckpointFolder(tmp_path, "two").load_last()

    assert CheckpointFolder(tmp_path, "one").load_last()[0] is not None


def test_bests_that_no_state_refers_to_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "digest")
    for step in (1, 2, 3, 4):
        folder.save_best(step, {"w": torch.tensor(float(step))})
        folder.save_last(build_state(step), best_step=step)

    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-000000003.ckpt", "best-000000004.ckpt"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from ml.checkpoints import CheckpointFolder
from ml.errors import DiskFull
folder = CheckpointFolder(Path(sys.argv[1]), "digest")
folder.save_last({"step": 1, "w": torch.zeros(10)}, best_step=None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
try:
    folder.save_last({"step": 2, "w": torch.randn(1000, 1000)}, best_step=None)
except DiskFull as error:
    state, _ = CheckpointFolder(Path(sys.argv[1]), "digest").load_last()
    print("full", state["step"], sorted(p.name for p in Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_is_named_and_the_complete_checkpoint_stays(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None

    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True, capture_output=True, text=True)

    assert done.stdout == "full 1 ['last.1.ckpt', 'last.ckpt']\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_write_that_finds_no_space_is_the_same_error(tmp_path: Path) -> None:
    code = FULL_DISK.replace("resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))", OPEN_FULL)

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)

    assert done.stdout.startswith("full 1 ")


OPEN_FULL = """
opened = Path.open
Path.open = lambda self, mode="r", **options: open("/dev/full", mode, 0) if mode == "wb" else opened(self, mode, **options)
"""
