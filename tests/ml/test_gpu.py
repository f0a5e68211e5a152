"""The same task on CUDA: training, labeling and resuming, within tolerance of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ml import pseudo_labels
from ml.config import NoiseConfig, RuntimeConfig
from ml.errors import Interrupted
from ml.events import Event, ignore, never
from ml.prediction import label
from ml.training import Training
from ml.training_inputs import gather
from tests.ml.builders_generations import build_generation
from tests.ml.builders_training import RUNTIME, build_recipe, build_training, label_task, teacher_task, write_digits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")]

CUDA = RuntimeConfig(device="cuda", precision="fp32", num_threads=1, num_loader_workers=0)
# The two devices draw different numbers for dropout and stochastic depth, so these are compared without.
QUIET = NoiseConfig(randaugment_operations=2, randaugment_magnitude=9)


def losses(data: Path, folder: Path, runtime: RuntimeConfig) -> list[float]:
    """The mean losses that twenty steps reported, every five."""
    recipe = build_recipe(training=build_training(steps=20, evaluate_every_steps=5), noise=QUIET)
    events: list[Event] = []
    task = teacher_task(data, recipe, runtime=runtime)
    Training(task, gather(task), folder, events.append, never).run()
    return [event.data["loss"] for event in events if event.kind == "metric" and "loss" in event.data]


def test_twenty_steps_lose_what_they_lose_on_the_cpu(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")

    ours = losses(data, tmp_path / "cuda", CUDA)

    assert ours == pytest.approx(losses(data, tmp_path / "cpu", RUNTIME), rel=0.05)


def test_bf16_trains_as_well_as_fp32(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")

    ours = losses(data, tmp_path / "bf16", replace(CUDA, precision="bf16"))

    assert ours == pytest.approx(losses(data, tmp_path / "cpu", RUNTIME), rel=0.2)


def test_two_hundred_images_get_the_labels_of_the_cpu(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", pool=200)
    names = tuple(map(str, range(10)))
    task = label_task(data, build_recipe(), build_generation(tmp_path / "generation", class_names=names), tmp_path / "cpu.parquet")

    label(task)
    label(replace(task, runtime=CUDA, output=str(tmp_path / "cuda.parquet")))

    ours, theirs = (pseudo_labels.read_shard(tmp_path / f"{device}.parquet") for device in ("cuda", "cpu"))
    assert ours["key"] == theirs["key"]
    assert len(ours) == 200
    # Two steps of fp16, in which labels are kept.
    np.testing.assert_allclose(pseudo_labels.dense_probs(ours, 10), pseudo_labels.dense_probs(theirs, 10), atol=2e-3)


def test_a_stopped_training_goes_on_where_it_was(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    recipe = build_recipe(training=build_training(steps=20, evaluate_every_steps=5), noise=QUIET)
    task = teacher_task(data, recipe, runtime=CUDA)
    undisturbed = Training(task, gather(task), tmp_path / "undisturbed", ignore, never)
    undisturbed.run()
    answers = iter([False] * 7 + [True])
    with pytest.raises(Interrupted):
        Training(task, gather(task), tmp_path / "stopped", ignore, lambda: next(answers)).run()

    resumed = Training(task, gather(task), tmp_path / "stopped", ignore, never)
    resumed.run()

    ours, theirs = resumed.learner.state()["ema"], undisturbed.learner.state()["ema"]
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.02)
