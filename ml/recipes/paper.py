"""The paper's recipes, complete: EfficientNet-B0 … B7 and L2 (Xie et al., arXiv 1911.04252, and its official code).

Departures, each stated: timm's parameter groups do not decay biases (the official code does); batch-norm is not synchronized in
groups on one device; the FixRes finish is not part of these recipes. The paper scores the pool with a separate small model: name its
generation in `labeling.selection_model` to do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ml.config import (
    ImageConfig,
    IterationConfig,
    LabelingConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    Recipe,
    ScheduleConfig,
    SelectionConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from ml.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the paper's table."""

    train_size: int
    """Training resolution in pixels."""
    dropout: float
    magnitude: int | None
    """RandAugment's; None: not used for this size."""
    ratios: tuple[int, ...]
    """Pseudo-labeled images for each labeled one, per iteration."""
    epochs: int
    """Passes over the labeled images: 700 up to B4, 350 above."""
    test_size: int | None = None
    """Evaluation resolution when it differs."""


TABLE: dict[str, Row] = {
    "b0": Row(224, 0.2, None, (1,), 700),
    "b1": Row(240, 0.2, None, (3,), 700),
    "b2": Row(260, 0.3, 6, (3,), 700),
    "b3": Row(300, 0.3, 12, (3,), 700),
    "b4": Row(380, 0.4, 15, (3,), 700),
    "b5": Row(456, 0.4, 18, (3,), 350),
    "b6": Row(528, 0.5, 24, (3,), 350),
    "b7": Row(600, 0.5, 27, (3,), 350),
    "l2": Row(475, 0.5, 27, (14, 14, 28), 350, 800),
}


def paper_recipe(size: str) -> Recipe:
    """The recipe of one size; L2's teacher is B7, every other size teaches itself."""
    if size not in TABLE:
        raise RecipeError(f"the paper has no EfficientNet size {size!r}; known: {', '.join(TABLE)}")
    row = TABLE[size]
    teacher_size = "b7" if size == "l2" else size
    evaluation = row.test_size or row.train_size
    return Recipe(
        name=f"paper-{size}",
        # The official evaluation crop leaves a border of 32 px at every resolution.
        image=ImageConfig(size=row.train_size, evaluation_size=row.test_size, crop_ratio=evaluation / (evaluation + 32)),
        teacher=TeacherConfig(network=_network(teacher_size), noise=_noise(TABLE[teacher_size]), training=_training(TABLE[teacher_size])),
        students=tuple(
            StudentConfig(network=_network(size), noise=_noise(row), training=_training(row), ratio=ratio) for ratio in row.ratios
        ),
        labeling=LabelingConfig(stored_probabilities=16, shard_size=10_000),
        selection=SelectionConfig(min_confidence=0.3, cap_per_class=130_000),
        iterations=IterationConfig(count=len(row.ratios)),
    )


def _network(size: str) -> NetworkConfig:
    return NetworkConfig(architecture=f"tf_efficientnet_{size}")


def _noise(row: Row) -> NoiseConfig:
    # Survival 0.8 at the last block, linear from 1.0 at the first.
    operations = 0 if row.magnitude is None else 2
    return NoiseConfig(
        randaugment_operations=operations, randaugment_magnitude=row.magnitude or 0, dropout=row.dropout, stochastic_depth=0.2
    )


def _training(row: Row) -> TrainingConfig:
    return TrainingConfig(
        epochs=row.epochs,
        batch_size=2048,
        label_smoothing=0.1,
        ema_decay=0.9999,
        optimizer=OptimizerConfig(
            name="rmsprop_tf", learning_rate=0.016, reference_batch=256, momentum=0.9, weight_decay=1e-5, epsilon=1e-3
        ),
        schedule=ScheduleConfig(name="step", warmup_ratio=5 / row.epochs, decay_rate=0.97, decay_epochs=2.4 * row.epochs / 350),
    )
