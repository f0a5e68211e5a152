"""Training against the CPU ceiling cores / (t_decode + t_augment + t_model), each alone on one core in the same process.

Training is the loop of `ml.training`: `TrainingBatches` with the workers that the runtime resolves to, and `Learner.step`. The
ceiling's network is written out here, apart from the Learner: forward, loss, backward, clipping, optimizer and average on one batch
that lies there normalized. Decoded small images are cached by design, so decoding them is no term of their ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path

import torch
from torch import nn

from bench.measurement import Measurement, interleaved, seconds_per_call, summary
from bench.photographs import manifest_of, photographs, small_photographs
from ml import models
from ml.config import RuntimeConfig
from ml.cores import num_cores
from ml.data import Batch, TrainingBatches
from ml.determinism import ReusedGenerator
from ml.devices import apply_runtime, autocast, resolve_runtime, shield_small_convolutions
from ml.ema import EmaWeights
from ml.learner import Learner
from ml.losses import labeled_cross_entropy
from ml.manifest import Manifest
from ml.optimizers import build_optimizer
from ml.pixels import Preprocessing, read_image, weak_view
from ml.recipes import get_recipe
from ml.schedules import plan_training
from ml.transforms import strong_view, strong_view_of_small

SEED = 1
STEPS = 1_000_000
"""Of the training that is looked into; far more than are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is measured, and for how long."""

    preset: str
    pool: Path
    repeats: int
    steps: int
    """Steps timed in one go."""
    warm_steps: int
    """Steps before them: what the loader had ready while the ceiling was measured must not count."""
    seconds: float
    """Of measuring decoding and augmentation, each."""


class Stage:
    """A preset's teacher in training, and the terms of its ceiling."""

    def __init__(self, setting: Setting, runtime: RuntimeConfig, *, batch: int | None = None) -> None:
        """`batch` images a step; None: as the preset says."""
        self.setting = setting
        self.recipe = get_recipe(setting.preset)
        training = self.recipe.teacher.training
        self.config = replace(self.recipe.teacher, training=replace(training, batch_size=batch or training.batch_size))
        self.manifest = Manifest.read(manifest_of(setting.pool, kind="labeled"))
        self.runtime = resolve_runtime(runtime)
        self.preprocessing = Preprocessing.from_config(self.recipe.image)
        plan = plan_training(self.config.training, num_labeled=len(self.manifest), ratio=0, role="teacher")
        self.plan = replace(plan, steps=STEPS, labeled_steps=range(STEPS))
        self.learner = Learner(
            self._network(),
            self.config,
            self.plan,
            role="teacher",
            preprocessing=self.preprocessing,
            training_side=self.recipe.image.size,
            runtime=self.runtime,
            seed=SEED,
        )
        self.batches = TrainingBatches(
            labeled=self.manifest,
            class_names=self.manifest.class_names,
            selected=None,
            unlabeled=None,
            image=self.recipe.image,
            noise=self.config.noise,
            plan=self.plan,
            seed=SEED,
            start_step=0,
            runtime=self.runtime,
        )
        self._paths = cycle(self.manifest.locations())
        self._images = cycle([read_image(path) for path in self.manifest.locations()[:100]])
        self._squares = cycle([weak_view(read_image(path), self.preprocessing) for path in self.manifest.locations()[:500]])
        self._numbers = count()
        self._generators = ReusedGenerator()
        self.alone = _Alone(self._network(), self)
        self.spans: dict[str, list[float]] = {"waiting for images": [], "in steps": []}
        """Seconds an image of each call of `rate`."""

    def _network(self) -> nn.Module:
        torch.manual_seed(SEED)
        num_classes = len(self.manifest.class_names)
        return models.create_network(self.config.network, num_classes=num_classes, noise=self.config.noise, image=self.recipe.image)

    def decode(self) -> float:
        """Seconds an image."""
        if self.recipe.image.small_images:
            return 0.0
        return seconds_per_call(lambda: read_image(next(self._paths)), at_least=self.setting.seconds)

    def augment(self) -> float:
        """Seconds an image."""
        image, noise = self.recipe.image, self.config.noise

        def one() -> None:
            generator = self._generators(SEED, "noise", "bench", 0, next(self._numbers))
            if image.small_images:
                strong_view_of_small(next(self._squares), image, noise, generator)
            else:
                strong_view(next(self._images), image, noise, generator)

        return seconds_per_call(one, at_least=self.setting.seconds)

    def network(self, num_threads: int = 1) -> float:
        """Seconds an image, with nothing beside it."""
        torch.set_num_threads(num_threads)
        seconds = seconds_per_call(self.alone.step, at_least=self.setting.seconds) / self.plan.batch
        apply_runtime(self.runtime)
        return seconds

    def network_as_run(self) -> float:
        """Seconds an image with the threads that the training has: the most that it can reach, whatever the loader does."""
        return self.network(self.runtime.num_threads)

    def rate(self, batches: Iterator[tuple[int, Batch]]) -> float:
        """Images a second of the training itself."""
        apply_runtime(self.runtime)
        for _ in range(self.setting.warm_steps):
            self.learner.step(*next(batches))
        loading = stepping = 0.0
        for _ in range(self.setting.steps):
            started = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            self.learner.step(*batch)
            loading, stepping = loading + loaded - started, stepping + time.perf_counter() - loaded
        self.learner.recent_losses()
        num_images = self.setting.steps * self.plan.batch
        self.spans["waiting for images"].append(loading / num_images)
        self.spans["in steps"].append(stepping / num_images)
        return num_images / (loading + stepping)


class _Alone:
    """The same network, precision, batch, optimizer and average, with nothing else around."""

    def __init__(self, network: nn.Module, stage: Stage) -> None:
        self._stage = stage
        device = torch.device(stage.runtime.device)
        self._network = network.to(device=device).to(memory_format=torch.channels_last).train()
        self._average = EmaWeights(self._network)
        side = stage.recipe.image.size
        shield_small_convolutions(self._network, stage.runtime, side=side)
        self._optimizer = build_optimizer(self._network, stage.config.training.optimizer)
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(stage.plan.batch, 3, side, side, generator=generator)
        self._images = images.to(device=device, memory_format=torch.channels_last)
        self._labels_B = torch.randint(0, len(stage.manifest.class_names), (stage.plan.batch,), generator=generator).to(device)

    def step(self) -> None:
        training = self._stage.config.training
        with autocast(self._stage.runtime):
            logits = self._network(self._images)
        labeled_cross_entropy(logits, self._labels_B, smoothing=training.label_smoothing).backward()  # type: ignore[no-untyped-call]
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._network.parameters(), training.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._average.update(training.ema_decay)


def measure() -> Measurement:
    found = Measurement(name="training", details={"seed": SEED})
    settings = (
        Setting(preset="small-32px", pool=small_photographs(8192), repeats=15, steps=10, warm_steps=1, seconds=0.4),
        Setting(preset="photos-224", pool=photographs(400), repeats=9, steps=2, warm_steps=3, seconds=0.7),
    )
    title = "Training, images/s (medians of interleaved repeats; the three terms on one core)"
    found.tables[title] = [_measure(setting, found) for setting in settings]
    return found


def _measure(setting: Setting, found: Measurement) -> dict[str, float | str]:
    stage = Stage(setting, RuntimeConfig(device="cpu"))
    with stage.batches as batches:
        numbered = iter(enumerate(batches))
        stage.rate(numbered)
        stage.network()
        parts = {
            "decode": stage.decode,
            "augment": stage.augment,
            "model": stage.network,
            "as run": stage.network_as_run,
            "rate": lambda: stage.rate(numbered),
        }
        turns = interleaved(parts, repeats=setting.repeats, most=setting.repeats + 3)
    terms = zip(turns["decode"], turns["augment"], turns["model"], strict=True)
    ceilings = [num_cores() / sum(seconds) for seconds in terms]
    ratios = [rate / ceiling for rate, ceiling in zip(turns["rate"], ceilings, strict=True)]
    found.figures[f"training-{setting.preset}"] = summary(ratios)["median"]
    found.details[setting.preset] = {"turns": turns, "spans": stage.spans, "runtime": str(stage.runtime), "batch": stage.plan.batch}
    decode = summary(turns["decode"])["median"]
    return {
        "preset": setting.preset,
        "decode": 1 / decode if decode else "cached",
        "augment": 1 / summary(turns["augment"])["median"],
        "network": 1 / summary(turns["model"])["median"],
        "with its threads": 1 / summary(turns["as run"])["median"],
        "ceiling": summary(ceilings)["median"],
        "training": summary(turns["rate"])["median"],
        **{f"s {name}": summary(seconds)["median"] for name, seconds in stage.spans.items()},
        "ratio": summary(ratios)["median"],
        "lowest": summary(ratios)["lowest"],
        "highest": summary(ratios)["highest"],
        "others' CPU": summary(turns["others"])["median"],
    }
