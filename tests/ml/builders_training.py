"""Real handwritten digits as PNG folders, and small training tasks on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.config import (
    ImageConfig,
    LabelingConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    Recipe,
    RuntimeConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from ml.schedules import TrainingPlan
from ml.selection import select
from ml.tasks import LabelingTask, SelectionTask, TrainingTask
from tests.ml.builders_generations import build_manifest

SIDE = 16
RUNTIME = RuntimeConfig(device="cpu", precision="fp32", num_threads=1, num_loader_workers=0)
IMAGE = ImageConfig(size=SIDE, small_images=True, flip=False, padding=2, mean=(0.3,) * 3, std=(0.35,) * 3)


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 255 / 16).astype(np.uint8), data.target.astype(np.int64)


def write_digits(root: Path, *, labeled: int = 8, validation: int = 4, test: int = 20, pool: int = 300, classes: int = 10) -> Path:
    """`root/{labeled,validation,test}/<digit>/N.png` with so many images a class, and `root/pool/N.png`; manifests beside them."""
    images, targets = _digits()
    wanted = {"labeled": labeled, "validation": validation, "test": test}
    counts = {(split, digit): 0 for split in wanted for digit in range(classes)}
    in_pool = 0
    for number, (image, digit) in enumerate(zip(images, targets, strict=True)):
        if digit >= classes:
            continue
        split = next((s for s, most in wanted.items() if counts[s, int(digit)] < most), None)
        if split is None and in_pool >= pool:
            continue
        folder = root / "pool" if split is None else root / split / str(digit)
        in_pool += split is None
        if split is not None:
            counts[split, int(digit)] += 1
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    build_manifest(root / "labeled", root / "labeled.parquet", kind="labeled")
    build_manifest(root / "pool", root / "pool.parquet", kind="unlabeled")
    for split in ("validation", "test"):
        build_manifest(root / split, root / f"{split}.parquet", kind="evaluation")
    return root


def build_plan(steps: int, batch_labeled: int, batch_unlabeled: int = 0) -> TrainingPlan:
    """So many steps, each with both kinds of images."""
    return TrainingPlan(
        steps=steps,
        warmup_steps=0,
        decay_every_steps=1.0,
        evaluate_every_steps=steps,
        batch_labeled=batch_labeled,
        batch_unlabeled=batch_unlabeled,
        learning_rate=0.1,
        labeled_steps=range(steps),
        unlabeled_steps=range(steps if batch_unlabeled else 0),
    )


def build_training(**fields: object) -> TrainingConfig:
    """Twelve steps of sixteen labeled images."""
    optimizer = OptimizerConfig(learning_rate=0.05, weight_decay=1e-4)
    values: dict[str, object] = {"steps": 12, "batch_size": 16, "ema_decay": 0.95, "evaluate_every_steps": 5, "optimizer": optimizer}
    return TrainingConfig(**(values | fields))  # type: ignore[arg-type]


def build_recipe(
    *, training: TrainingConfig | None = None, noise: NoiseConfig | None = None, architecture: str = "test_resnet", **student: object
) -> Recipe:
    """Teacher and student of one small network, with every kind of noise."""
    network = NetworkConfig(architecture=architecture)
    noise = noise or NoiseConfig(randaugment_operations=1, randaugment_magnitude=5, dropout=0.1, stochastic_depth=0.1)
    values: dict[str, object] = {"network": network, "noise": noise, "training": training or build_training(), "ratio": 2}
    return Recipe(
        name="tests",
        seed=3,
        image=IMAGE,
        teacher=TeacherConfig(network=network, noise=noise, training=training or build_training()),
        students=(StudentConfig(**(values | student)),),  # type: ignore[arg-type]
        labeling=LabelingConfig(batch_size=32),
        selection=SelectionConfig(min_confidence=0.0, require_every_class=False, near_duplicate_distance=None),
    )


def teacher_task(data: Path, recipe: Recipe, **fields: object) -> TrainingTask:
    """Train generation 0 on the digits in `data`."""
    values: dict[str, object] = {
        "role": "teacher",
        "iteration": 0,
        "recipe": recipe,
        "runtime": RUNTIME,
        "labeled": str(data / "labeled.parquet"),
        "validation": str(data / "validation.parquet"),
        "test": str(data / "test.parquet"),
    }
    return TrainingTask(**(values | fields))  # type: ignore[arg-type]


def student_task(data: Path, recipe: Recipe, selected: Path, **fields: object) -> TrainingTask:
    """Train iteration 1's student on the digits and pseudo-labels."""
    values: dict[str, object] = {
        "role": "student",
        "iteration": 1,
        "student": recipe.students[0],
        "unlabeled": str(data / "pool.parquet"),
        "selected": str(selected),
    }
    return teacher_task(data, recipe, **(values | fields))


def label_task(data: Path, recipe: Recipe, generation: Path, output: Path) -> LabelingTask:
    """Label the whole pool in one shard."""
    return LabelingTask(
        generation=str(generation),
        unlabeled=str(data / "pool.parquet"),
        start=0,
        stop=10**9,
        labeling=recipe.labeling,
        runtime=RUNTIME,
        output=str(output),
    )


def select_from(data: Path, recipe: Recipe, shard: Path, output: Path, *, classes: int = 10) -> Path:
    """Select pseudo-labels from one shard by the recipe."""
    task = SelectionTask(
        shards=(str(shard),),
        unlabeled=str(data / "pool.parquet"),
        evaluation=(str(data / "validation.parquet"), str(data / "test.parquet")),
        class_names=tuple(map(str, range(classes))),
        selection=recipe.selection,
        seed=recipe.seed,
        output=str(output),
    )
    select(task)
    return output
