"""Batches depend on the seed and the step alone."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

import ml.data
from ml.config import ImageConfig, NoiseConfig, RuntimeConfig
from ml.data import Batch, TrainingBatches
from ml.errors import BadImage, DataError, LoaderLost
from ml.ingestion import scan
from ml.pixels import decode
from ml.pseudo_labels import write_shard
from ml.selection import SelectedLabels
from ml.views import TICKETS, ImageStream, claimed_rows
from tests.ml import builders_images as builders
from tests.ml.builders_training import build_plan

SMALL = ImageConfig(size=32, small_images=True)
PLAIN = NoiseConfig(randaugment_operations=0, crop_and_flip=False)
NAMES = ("cat", "dog")


TOGETHER = RuntimeConfig(device="cpu", num_threads=3, num_loader_workers=1)
"""On two cores the network takes all, so every step is made by all."""
AHEAD = RuntimeConfig(device="cpu", num_threads=1, num_loader_workers=2, cache_bytes=0)
"""Whole steps are made in turn: nothing is cached."""


def build_selected(path: Path, keys: list[str], repeats: list[int]) -> SelectedLabels:
    probs = np.random.default_rng(0).dirichlet([1, 1], len(keys)).astype(np.float32)
    write_shard(
        path,
        keys=keys,
        statuses=["ok"] * len(keys),
        probs_MK=probs,
        class_names=NAMES,
        stored_probabilities="all",
        facts={},
    )
    labels = pa.parquet.read_table(path)
    selected = labels.append_column("repeat", pa.array(repeats, pa.int32()))
    pa.parquet.write_table(selected, path)
    return SelectedLabels.read(path)


def build_batches(folder: Path, *, pool: bool = True, **changes: Any) -> TrainingBatches:
    if not folder.exists():
        builders.write_class_folders(folder / "labeled", {"cat": 5, "dog": 4})
        builders.write_flat_folder(folder / "pool", 6)
    labeled, _ = scan(folder / "labeled", kind="labeled")
    unlabeled, _ = scan(folder / "pool", kind="unlabeled")
    keys = unlabeled.column("key")[1:]
    options: dict[str, Any] = {
        "labeled": labeled,
        "class_names": NAMES,
        "selected": build_selected(folder / "selected", keys, [1, 2, 3, 1, 1]) if pool else None,
        "unlabeled": unlabeled if pool else None,
        "image": SMALL,
        "noise": NoiseConfig(),
        "plan": build_plan(6, 4, 6 if pool else 0),
        "seed": 5,
        "start_step": 0,
        "runtime": RuntimeConfig(device="cpu", precision="fp32", num_threads=1, num_loader_workers=0),
    }
    return TrainingBatches(**(options | changes))


def collect(batches: TrainingBatches) -> list[Batch]:
    with batches:
        return [Batch(b.images.clone(), b.labels_B.clone(), None, None if b.soft_UK is None else b.soft_UK.clone()) for b in batches]


def collect_after_killing_a_worker(batches: TrainingBatches) -> None:
    for number, _ in enumerate(batches):
        if number == 0:
            multiprocessing.active_children()[0].kill()


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels_B, b.labels_B)
        and (a.soft_UK is b.soft_UK is None or (a.soft_UK is not None and b.soft_UK is not None and torch.equal(a.soft_UK, b.soft_UK)))
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_has_the_labeled_images_first(tmp_path: Path) -> None:
    batch = collect(build_batches(tmp_path / "d"))[0]

    assert batch.images.shape == (10, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.labels_B.shape == (4,)
    assert batch.labels_B.dtype == torch.int64
    assert batch.soft_UK is not None
    assert batch.soft_UK.shape == (6, 2)
    torch.testing.assert_close(batch.soft_UK.sum(1), torch.ones(6))


def test_a_control_has_no_pseudo_labels(tmp_path: Path) -> None:
    batch = collect(build_batches(tmp_path / "d", pool=False, plan=build_plan(6, 10)))[0]

    assert batch.images.shape == (10, 3, 32, 32)
    assert batch.soft_UK is None


def noised(batch: Batch, weak: set[bytes]) -> list[bool]:
    return [image.permute(1, 2, 0).contiguous().numpy().tobytes() not in weak for image in batch.images]


def weak_views(folder: Path) -> set[bytes]:
    return {decode(path.read_bytes()).tobytes() for path in folder.rglob("*.png")}


def test_pseudo_labeled_images_may_have_noise_of_their_own(tmp_path: Path) -> None:
    batches = collect(build_batches(tmp_path / "d", unlabeled_noise=PLAIN))
    weak = weak_views(tmp_path / "d")

    noise = np.array([noised(batch, weak) for batch in batches])

    assert not noise[:, 4:].any()
    assert noise[:, :4].mean() > 0.9


def test_fading_noise_ends_with_weak_views_of_the_pool_alone(tmp_path: Path) -> None:
    batches = collect(build_batches(tmp_path / "d", plan=build_plan(60, 4, 6), fade_ratio=0.5))
    weak = weak_views(tmp_path / "d")

    noise = np.array([noised(batch, weak) for batch in batches])

    assert noise[:, :4].mean() > 0.9
    assert noise[:30, 4:].mean() > 0.9
    assert 0.3 < noise[40:50, 4:].mean() < 0.7
    assert noise[56:, 4:].mean() < 0.25


def test_pretraining_sees_the_pool_and_finetuning_the_labels(tmp_path: Path) -> None:
    plan = replace(build_plan(6, 10, 10), labeled_steps=range(4, 6), unlabeled_steps=range(4))

    batches = collect(build_batches(tmp_path / "d", plan=plan, noise=PLAIN))

    assert [len(batch.labels_B) for batch in batches] == [0] * 4 + [10] * 2
    assert [None if batch.soft_UK is None else len(batch.soft_UK) for batch in batches] == [10] * 4 + [None] * 2
    assert {batch.images.shape for batch in batches} == {(10, 3, 32, 32)}
    pool, labeled = weak_views(tmp_path / "d" / "pool"), weak_views(tmp_path / "d" / "labeled")
    assert [noised(batch, pool) for batch in batches[:4]] == [[False] * 10] * 4
    assert [noised(batch, labeled) for batch in batches[4:]] == [[False] * 10] * 2


def test_images_keep_their_labels(tmp_path: Path) -> None:
    batches = build_batches(tmp_path / "d", noise=PLAIN, plan=build_plan(9, 4, 6))
    label_of = {decode(path.read_bytes()).tobytes(): NAMES.index(path.parent.name) for path in (tmp_path / "d" / "labeled").glob("*/*.png")}
    selected = SelectedLabels.read(tmp_path / "d" / "selected")
    pool_keys = selected.keys().to_pylist()
    row_of = {decode((tmp_path / "d" / "pool" / key).read_bytes()).tobytes(): row for row, key in enumerate(pool_keys)}

    for batch in collect(batches):
        pixels = [image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in batch.images]
        assert [label_of[image] for image in pixels[:4]] == batch.labels_B.tolist()
        assert batch.soft_UK is not None
        np.testing.assert_array_equal(selected.soft(np.array([row_of[image] for image in pixels[4:]])), batch.soft_UK.numpy())


def test_an_epoch_visits_each_image_as_often_as_it_repeats() -> None:
    stream = ImageStream("unlabeled", 3, np.array([1, 4, 2]))

    first, second = (stream.places(start, start + 7) for start in (0, 7))

    assert Counter(image for image, _, _ in first) == Counter(image for image, _, _ in second) == {0: 1, 1: 4, 2: 2}
    assert [image for image, _, _ in first] != [image for image, _, _ in second]
    assert stream.places(5, 9) == first[5:] + second[:2]
    # Repeats of one image have noise of their own.
    assert len({place[1:] for place in first + second}) == 14


@pytest.mark.parametrize("image", [SMALL, ImageConfig(size=32)])
def test_starting_at_a_step_gives_what_going_there_gives(tmp_path: Path, image: ImageConfig) -> None:
    whole = collect(build_batches(tmp_path / "d", image=image))
    rest = collect(build_batches(tmp_path / "d", image=image, start_step=4))

    assert same(whole[4:], rest)
    assert not any(torch.equal(a.images, b.images) for a, b in pairwise(whole))


def test_another_seed_gives_other_batches(tmp_path: Path) -> None:
    assert not same(collect(build_batches(tmp_path / "d")), collect(build_batches(tmp_path / "d", seed=6)))


def test_the_cache_changes_nothing(tmp_path: Path) -> None:
    runtime = RuntimeConfig(num_loader_workers=0, cache_bytes=0)

    assert same(collect(build_batches(tmp_path / "d")), collect(build_batches(tmp_path / "d", runtime=runtime)))


@pytest.mark.parametrize("runtime", [TOGETHER, AHEAD])
def test_the_bits_do_not_depend_on_the_workers_nor_on_torchs_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: RuntimeConfig
) -> None:
    plan = build_plan(6, 40, 60)
    alone = collect(build_batches(tmp_path / "d", plan=plan))
    monkeypatch.setattr(ml.data, "_WORTH_A_WORKER_SECONDS", 0)
    monkeypatch.setattr(ml.data, "num_cores", lambda: 2)
    before = torch.random.get_rng_state()

    crowd = collect(build_batches(tmp_path / "d", runtime=runtime, plan=plan))

    assert same(alone, crowd)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_vanished_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = build_batches(tmp_path / "d")
    (tmp_path / "d" / "labeled" / "cat" / "00000.png").unlink()

    with pytest.raises(BadImage, match=r"cat/00000\.png") as caught:
        collect(batches)

    assert caught.value.status == "missing"
    monkeypatch.setattr(ml.data, "_WORTH_A_WORKER_SECONDS", 0)
    (tmp_path / "d" / "pool" / "10003.png").write_bytes(b"")
    batches = build_batches(tmp_path / "d", pool=False, runtime=RuntimeConfig(device="cpu", num_loader_workers=1))
    (tmp_path / "d" / "labeled" / "dog" / "00006.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"dog/00006\.png") as caught:
        collect(batches)
    assert caught.value.status == "changed"


def test_a_selection_of_another_pool_is_refused(tmp_path: Path) -> None:
    build_batches(tmp_path / "d")
    selected = build_selected(tmp_path / "other", ["elsewhere.png"], [1])

    with pytest.raises(DataError, match=r"1 selected images are not in the pool, for example elsewhere\.png"):
        build_batches(tmp_path / "d", selected=selected)


def test_workers_are_started_when_they_are_worth_it_and_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeConfig(num_threads=5, num_loader_workers=3)

    def count(**changes: Any) -> int:
        given: dict[str, Any] = {"shared": False, "num_steps": 100, "seconds": 100, "cache_bytes": 0, "batch_bytes": 0}
        return ml.data._count_workers(runtime, **given | changes)

    assert count(seconds=1) == 0
    assert count() == 3
    assert count(shared=True) == 4
    assert count(num_steps=2) == 2
    monkeypatch.setattr(ml.data, "_SHARED_MEMORY", Path("/"))
    assert count(cache_bytes=10**18) == 0


def test_every_row_is_made_by_one_of_those_who_share_a_step() -> None:
    tickets, till = multiprocessing.Pipe(duplex=False)
    os.set_blocking(tickets.fileno(), False)
    os.write(till.fileno(), TICKETS)
    one, other = claimed_rows(tickets, 200), claimed_rows(tickets, 200)

    first = [next(one) for _ in range(10)]
    rest = list(other)

    assert first[:4] == [0, 64, 128, 192]
    assert sorted([*first, *one, *rest]) == list(range(200))


@pytest.mark.parametrize("runtime", [TOGETHER, AHEAD])
def test_a_killed_worker_is_noticed_and_leaving_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: RuntimeConfig
) -> None:
    monkeypatch.setattr(ml.data, "_WORTH_A_WORKER_SECONDS", 0)
    monkeypatch.setattr(ml.data, "num_cores", lambda: 2)
    batches = build_batches(tmp_path / "d", plan=build_plan(1000, 4, 6), runtime=runtime)

    with batches, pytest.raises(LoaderLost, match="worker died with exit code -9"):
        collect_after_killing_a_worker(batches)

    assert multiprocessing.active_children() == []


def test_workers_end_when_the_training_process_is_killed(tmp_path: Path) -> None:
    code = f"""
import multiprocessing, os, signal
from pathlib import Path
import ml.data
from ml.config import RuntimeConfig
from tests.ml.builders_training import build_plan
from tests.ml.test_data import build_batches

if __name__ == "__main__":
    ml.data._WORTH_A_WORKER_SECONDS = 0
    runtime = RuntimeConfig(device="cpu", num_loader_workers=1)
    next(iter(build_batches(Path({str(tmp_path / "d")!r}), plan=build_plan(100000, 4, 6), runtime=runtime)))
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "script.py"
    script.write_text(code)

    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )

    worker = int(done.stdout)
    limit = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_worker_reaches_no_torch() -> None:
    code = "import ml.views, sys; sys.exit(any(name in sys.modules for name in ('torch', 'timm')))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
