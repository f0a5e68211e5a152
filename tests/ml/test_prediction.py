"""Labeling and evaluation: no noise, one row per image, the same bits however the work is shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ml.prediction
from ml import pseudo_labels
from ml.config import LabelingConfig, RuntimeConfig
from ml.errors import Interrupted
from ml.events import Event
from ml.models import load_generation
from ml.prediction import WeakViews, evaluate, forward, label, predict
from ml.tasks import EvaluationTask, LabelingTask
from tests.ml.builders_generations import RUNTIME, build_generation, build_manifest
from tests.ml.builders_images import write_class_folders, write_flat_folder

CPU = torch.device("cpu")


def build_task(folder: Path, **fields: object) -> LabelingTask:
    """Label a pool of 21 images, one of them broken since it was scanned and one always."""
    pool = write_flat_folder(folder / "pool", 20)
    (pool / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    build_manifest(pool, folder / "pool.parquet", kind="unlabeled")
    (pool / "10003.png").unlink()
    values: dict[str, object] = {
        "generation": str(build_generation(folder / "generation")),
        "unlabeled": str(folder / "pool.parquet"),
        "start": 0,
        "stop": 21,
        "labeling": LabelingConfig(batch_size=4),
        "runtime": RUNTIME,
        "output": str(folder / "shard.parquet"),
    }
    return LabelingTask(**(values | fields))  # type: ignore[arg-type]


def test_every_row_has_an_answer_whatever_happened_to_its_file(tmp_path: Path) -> None:
    summary = label(build_task(tmp_path))

    table = pseudo_labels.read_shard(tmp_path / "shard.parquet")
    statuses = dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert len(statuses) == 21
    assert (statuses.pop("00000.png"), statuses.pop("10003.png")) == ("undecodable", "missing")
    assert set(statuses.values()) == {"ok"}
    assert summary["statuses"] == {"ok": 19, "undecodable": 1, "missing": 1}


def test_a_broken_file_does_not_shift_its_neighbours(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    label(task)
    table = pseudo_labels.read_shard(task.output)
    row = table["key"].to_pylist().index("10004.png")

    label(replace(task, start=row, stop=row + 1, output=str(tmp_path / "alone.parquet")))

    alone = pseudo_labels.read_shard(tmp_path / "alone.parquet")
    np.testing.assert_allclose(pseudo_labels.dense_probs(table, 2)[row], pseudo_labels.dense_probs(alone, 2)[0], atol=1e-3)


def test_the_teacher_is_never_in_train_mode_while_labeling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(tmp_path)
    modes: set[bool] = set()
    plain_call = torch.nn.Module.__call__

    def watching(module: torch.nn.Module, *args: object, **options: object) -> object:
        modes.add(module.training or torch.is_grad_enabled())
        return plain_call(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", watching)
    label(task)

    assert modes == {False}


def test_a_network_in_train_mode_is_refused(tmp_path: Path) -> None:
    build_task(tmp_path)
    generation = load_generation(tmp_path / "generation", CPU)
    manifest = build_manifest(tmp_path / "pool", tmp_path / "again.parquet", kind="unlabeled")
    next(iter(generation.network.children())).train()

    with pytest.raises(ValueError, match="train mode"):
        predict(generation.network, WeakViews(manifest, generation.preprocessing, batch_size=4), num_classes=2, runtime=RUNTIME)


def test_labels_do_not_depend_on_how_many_threads_share_the_work(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    label(task)
    shared = replace(task, runtime=replace(RUNTIME, num_threads=2, num_loader_workers=2), output=str(tmp_path / "shared.parquet"))

    label(shared)

    assert (tmp_path / "shard.parquet").read_bytes() == (tmp_path / "shared.parquet").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_that_are_fetched_later_give_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """An accelerator's way, walked on the CPU: what is launched is fetched two batches later."""
    task = build_task(tmp_path, labeling=LabelingConfig(batch_size=batch_size))
    label(task)
    monkeypatch.setattr(ml.prediction, "_on_cpu", ml.prediction._on_accelerator)

    label(replace(task, output=str(tmp_path / "later.parquet")))

    assert (tmp_path / "shard.parquet").read_bytes() == (tmp_path / "later.parquet").read_bytes()


def test_a_complete_shard_is_left_alone_and_one_of_another_teacher_is_not(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    label(task)
    written = (tmp_path / "shard.parquet").stat().st_mtime_ns

    assert label(task)["skipped"]
    assert (tmp_path / "shard.parquet").stat().st_mtime_ns == written

    other = replace(task, generation=str(build_generation(tmp_path / "other", seed=1)))
    assert not label(other)["skipped"]


def test_stopping_leaves_no_shard_and_starting_again_writes_it(tmp_path: Path) -> None:
    task = build_task(tmp_path)

    with pytest.raises(Interrupted):
        label(task, should_stop=lambda: True)

    assert list(tmp_path.glob("*shard*")) == []
    assert not label(task)["skipped"]


def test_the_temperature_is_used_only_when_asked_for(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    label(task)
    label(replace(task, labeling=LabelingConfig(batch_size=4, calibrate=True), output=str(tmp_path / "calibrated.parquet")))

    plain = pseudo_labels.dense_probs(pseudo_labels.read_shard(task.output), 2)[1]
    calibrated = pseudo_labels.dense_probs(pseudo_labels.read_shard(tmp_path / "calibrated.parquet"), 2)[1]

    sharper = calibrated**1.5 / (calibrated**1.5).sum()
    np.testing.assert_allclose(sharper, plain, atol=2e-3)


def test_bf16_labels_are_close_and_say_what_they_are(tmp_path: Path) -> None:
    task = build_task(tmp_path)
    label(task)
    label(replace(task, runtime=replace(RUNTIME, precision="bf16"), output=str(tmp_path / "bf16.parquet")))

    exact = pseudo_labels.dense_probs(pseudo_labels.read_shard(task.output), 2)
    close = pseudo_labels.dense_probs(pseudo_labels.read_shard(tmp_path / "bf16.parquet"), 2)
    assert 0 < np.abs(exact - close).max() < 0.05
    assert pseudo_labels.read_facts(tmp_path / "bf16.parquet")["precision"] == "bf16"


def test_progress_ends_with_everything_done(tmp_path: Path) -> None:
    events: list[Event] = []

    label(build_task(tmp_path), on_event=events.append)

    assert events[0].data == {"stage": "labeling"}
    assert (events[-1].data["done"], events[-1].data["total"], events[-1].data["unit"]) == (21, 21, "images")


def test_views_kept_in_memory_are_the_views_read_anew(tmp_path: Path) -> None:
    manifest = build_manifest(write_flat_folder(tmp_path / "pool", 9), tmp_path / "pool.parquet", kind="unlabeled")
    generation = load_generation(build_generation(tmp_path / "generation"), CPU)
    views = WeakViews(manifest, generation.preprocessing, batch_size=4, cache_bytes=10**6)
    first = predict(generation.network, views, num_classes=2, runtime=RUNTIME)
    for path, *_ in manifest.locations():
        Path(path).unlink()

    second = predict(generation.network, views, num_classes=2, runtime=RUNTIME)

    assert second.statuses == ["ok"] * 9
    assert np.array_equal(first.logits, second.logits)
    assert views.first_images(6).shape == (6, 32, 32, 3)


def test_evaluation_counts_right_answers_and_unreadable_files(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "test", {"blue": 6, "red": 6})
    manifest = build_manifest(root, tmp_path / "test.parquet", kind="evaluation")
    generation = load_generation(build_generation(tmp_path / "generation"), CPU)
    images = WeakViews(manifest, generation.preprocessing, batch_size=12).batch(0)[0]
    guesses = forward(generation.network, images, generation.preprocessing, RUNTIME).argmax(-1)
    Path(manifest.locations()[0].path).unlink()

    runtime = RuntimeConfig(device="cpu", precision="bf16", num_threads=1, num_loader_workers=0)
    task = EvaluationTask(generation=str(tmp_path / "generation"), manifest=str(tmp_path / "test.parquet"), runtime=runtime)
    figures = evaluate(task, predictions=tmp_path / "predictions.parquet")

    assert figures["top1"] == pytest.approx((guesses == np.repeat([0, 1], 6))[1:].mean())
    assert (figures["num_images"], figures["num_unreadable"], figures["temperature"]) == (11, 1, 1.5)
    assert (tmp_path / "predictions.parquet").exists()
