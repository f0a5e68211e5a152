"""How long a training lasts and how fast it learns at each step, as closed forms in plain Python.

A *step* is one optimizer update and is counted from 0; an *epoch* is one pass over the labeled images alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ml.config import Recipe, ScheduleConfig, TrainingConfig
from ml.errors import TooFewLabels

NUM_EVALUATIONS = 20
"""Looks at validation when the recipe does not say how often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """A training config with the number of labeled images filled in."""

    steps: int
    """Optimizer updates."""
    warmup_steps: int
    """Leading steps with a linearly rising rate."""
    decay_every_steps: float
    """Length of one stair of the `step` schedule; a fraction is kept, so the stairs fall where the epochs do."""
    evaluate_every_steps: int
    batch_labeled: int
    """Labeled images a step."""
    batch_unlabeled: int
    """Pseudo-labeled images a step."""
    learning_rate: float
    """Peak, already scaled with the batch."""
    labeled_steps: range
    """Steps that hold labeled images."""
    unlabeled_steps: range
    """Steps that hold pseudo-labeled images."""

    @property
    def batch(self) -> int:
        """Images a step, of both kinds, the same in every step: what the throughput counts."""
        return self.batch_labeled * (0 in self.labeled_steps) + self.batch_unlabeled * (0 in self.unlabeled_steps)


Mixing = Literal["joint", "pretrain-finetune", "pseudo-labels-alone"]


def plan_training(
    training: TrainingConfig,
    *,
    num_labeled: int,
    ratio: int,
    role: Literal["teacher", "student", "control"],
    mixing: Mixing = "joint",
    finetune_ratio: float = 0.25,
) -> TrainingPlan:
    """Turn epochs and batches into steps; TooFewLabels when there are fewer labeled images than one batch takes.

    `ratio` is r of the student, and of the student that a control stands beside; 0 for a teacher. The learning rate
    scales with B, never with (1 + r)B, and a control keeps the student's: only where its images come from differs.
    `mixing` and `finetune_ratio` are the student's; every step has as many images, of whichever kind.
    """
    size = training.batch_size
    if num_labeled < size:
        raise TooFewLabels(
            f"{num_labeled} labeled training images are fewer than one batch of {size}: add labels, or lower batch_size to {num_labeled}",
            num_labeled=num_labeled,
            batch_size=size,
        )
    steps = training.steps or max(1, round((training.epochs or 0) * num_labeled / size))
    optimizer = training.optimizer
    labeled_steps, unlabeled_steps = _steps_of_each(steps, role=role, mixing=mixing, finetune_ratio=finetune_ratio)
    both = role == "student" and mixing == "joint"
    return TrainingPlan(
        steps=steps,
        warmup_steps=round(training.schedule.warmup_ratio * steps),
        decay_every_steps=training.schedule.decay_epochs * num_labeled / size,
        evaluate_every_steps=training.evaluate_every_steps or math.ceil(steps / NUM_EVALUATIONS),
        batch_labeled=(size if both or role == "teacher" else size * (1 + ratio)) if labeled_steps else 0,
        batch_unlabeled=(size * ratio if both else size * (1 + ratio)) if unlabeled_steps else 0,
        learning_rate=optimizer.learning_rate * size / (optimizer.reference_batch or size),
        labeled_steps=labeled_steps,
        unlabeled_steps=unlabeled_steps,
    )


def _steps_of_each(steps: int, *, role: str, mixing: Mixing, finetune_ratio: float) -> tuple[range, range]:
    """The steps that hold labeled images, and those that hold pseudo-labeled ones."""
    if role != "student":
        return range(steps), range(0)
    if mixing == "joint":
        return range(steps), range(steps)
    if mixing == "pseudo-labels-alone":
        return range(0), range(steps)
    # One step of each at least; a single step has nothing to finetune.
    turn = min(max(1, round((1 - finetune_ratio) * steps)), max(1, steps - 1))
    return range(turn, steps), range(turn)


def check_batches(recipe: Recipe, *, num_labeled: int, iterations: int, has_teacher: bool = False) -> None:
    """TooFewLabels that names every batch of the recipe for which there are too few labeled training images.

    `has_teacher`: generation 0 is given and not trained. Its `pointers` are the fields.
    """
    used = recipe.students[:iterations]
    sizes = {} if has_teacher else {"teacher": recipe.teacher.training.batch_size}
    sizes |= {f"students.{place}": student.training.batch_size for place, student in enumerate(used)}
    large = {f"{name}.training.batch_size": size for name, size in sizes.items() if size > num_labeled}
    if large:
        batches = " and ".join(f"{size} ({name})" for name, size in large.items())
        raise TooFewLabels(
            f"{num_labeled} labeled training images are fewer than one batch of {batches}: add labels, or lower to {num_labeled} at most",
            num_labeled=num_labeled,
            pointers=[f"/{name.replace('.', '/')}" for name in large],
        )


def learning_rate_at(plan: TrainingPlan, schedule: ScheduleConfig, step: int) -> float:
    """The rate of the update that is made at `step`.

    Warm-up rises linearly and, unlike the official code, not from 0: its first update would move nothing. The stairs
    are counted from step 0, not from the end of warm-up, as there. The cosine falls to 0 at the (never made) step `steps`.
    """
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / (plan.warmup_steps + 1)
    if schedule.name == "step":
        return plan.learning_rate * schedule.decay_rate ** math.floor(step / plan.decay_every_steps)
    if schedule.name == "cosine":
        done_ratio = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
        return plan.learning_rate * (1 + math.cos(math.pi * done_ratio)) / 2
    return plan.learning_rate


def noised_ratio_at(steps: int, fade_ratio: float, step: int) -> float:
    """Share of the noise on pseudo-labeled images that is left at `step`: 1, then over the last `fade_ratio` of all steps linearly to 0."""
    return min(1.0, (steps - step) / (fade_ratio * steps)) if fade_ratio else 1.0


def ema_decay_at(decay: float, step: int) -> float:
    """Share of the old average kept after the update at `step`: min(decay, (1 + t) / (10 + t)), TensorFlow's warm-up."""
    return min(decay, (1 + step) / (10 + step))
