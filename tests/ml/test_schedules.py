"""Steps and learning rates against their closed forms, written out here a second time."""

from __future__ import annotations

import itertools
import math

import pytest

from ml.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from ml.errors import TooFewLabels
from ml.schedules import Mixing, TrainingPlan, ema_decay_at, learning_rate_at, noised_ratio_at, plan_training


def build_plan(**fields: float) -> TrainingPlan:
    values: dict[str, object] = {
        "steps": 1000,
        "warmup_steps": 100,
        "decay_every_steps": 240.0,
        "evaluate_every_steps": 50,
        "batch_labeled": 8,
        "batch_unlabeled": 0,
        "learning_rate": 0.1,
        "labeled_steps": range(1000),
        "unlabeled_steps": range(0),
    }
    return TrainingPlan(**(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mixing", "labeled", "unlabeled", "sizes"),
    [
        ("joint", range(100), range(100), (8, 24)),
        ("pseudo-labels-alone", range(0), range(100), (0, 32)),
        ("pretrain-finetune", range(80, 100), range(80), (32, 32)),
    ],
)
def test_every_mixing_puts_equally_many_images_through_a_step(
    mixing: Mixing, labeled: range, unlabeled: range, sizes: tuple[int, int]
) -> None:
    plan = plan_training(
        TrainingConfig(steps=100, batch_size=8), num_labeled=50, ratio=3, role="student", mixing=mixing, finetune_ratio=0.2
    )

    assert (plan.labeled_steps, plan.unlabeled_steps) == (labeled, unlabeled)
    assert (plan.batch_labeled, plan.batch_unlabeled, plan.batch) == (*sizes, 32)


def test_finetuning_has_a_step_however_short_the_training_is() -> None:
    plan = plan_training(
        TrainingConfig(steps=2, batch_size=8), num_labeled=50, ratio=1, role="student", mixing="pretrain-finetune", finetune_ratio=0.01
    )

    assert (plan.labeled_steps, plan.unlabeled_steps) == (range(1, 2), range(1))


def test_noise_fades_linearly_over_the_last_share_of_the_steps() -> None:
    assert [noised_ratio_at(100, 0.5, step) for step in (0, 50, 75, 99)] == pytest.approx([1, 1, 0.5, 0.02])
    assert [noised_ratio_at(100, 1.0, step) for step in (0, 50, 99)] == pytest.approx([1, 0.5, 0.01])
    assert noised_ratio_at(100, 0.0, 99) == 1


def test_the_papers_numbers_come_out_of_the_papers_recipe() -> None:
    training = TrainingConfig(
        epochs=350,
        batch_size=2048,
        optimizer=OptimizerConfig(name="rmsprop_tf", learning_rate=0.016, reference_batch=256),
        schedule=ScheduleConfig(name="step", warmup_ratio=5 / 350, decay_rate=0.97, decay_epochs=2.4),
    )

    plan = plan_training(training, num_labeled=1_281_167, ratio=3, role="student")

    steps_per_epoch = 1_281_167 / 2048
    assert plan.learning_rate == pytest.approx(0.128)
    assert plan.steps == round(350 * steps_per_epoch)
    assert plan.warmup_steps == round(5 * steps_per_epoch)
    assert plan.decay_every_steps == pytest.approx(2.4 * steps_per_epoch)
    assert (plan.batch_labeled, plan.batch_unlabeled) == (2048, 3 * 2048)


def test_the_staircase_is_counted_from_step_zero_as_in_the_official_code() -> None:
    schedule = ScheduleConfig(name="step", decay_rate=0.97)
    plan = build_plan()

    rates = [learning_rate_at(plan, schedule, step) for step in range(100, 1000)]

    assert rates == [pytest.approx(0.1 * 0.97 ** (step // 240)) for step in range(100, 1000)]


def test_warm_up_rises_evenly_and_never_starts_at_zero() -> None:
    plan = build_plan()

    rates = [learning_rate_at(plan, ScheduleConfig(name="constant"), step) for step in range(101)]

    assert rates[0] == pytest.approx(0.1 / 101)
    assert {round(b - a, 12) for a, b in itertools.pairwise(rates)} == {round(0.1 / 101, 12)}
    assert rates[100] == 0.1


def test_the_cosine_falls_from_the_peak_to_just_above_zero() -> None:
    plan = build_plan()
    schedule = ScheduleConfig(name="cosine")

    assert learning_rate_at(plan, schedule, 100) == 0.1
    assert learning_rate_at(plan, schedule, 550) == pytest.approx(0.05)
    assert learning_rate_at(plan, schedule, 999) == pytest.approx(0.05 * (1 + math.cos(math.pi * 899 / 900)))
    assert learning_rate_at(plan, schedule, 999) > 0


def test_a_control_takes_as_many_images_a_step_as_its_student_at_the_same_rate() -> None:
    training = TrainingConfig(epochs=10, batch_size=10, optimizer=OptimizerConfig(learning_rate=0.1, reference_batch=20))

    student = plan_training(training, num_labeled=100, ratio=3, role="student")
    control = plan_training(training, num_labeled=100, ratio=3, role="control")

    assert (student.batch_labeled, student.batch_unlabeled) == (10, 30)
    assert (control.batch_labeled, control.batch_unlabeled) == (40, 0)
    assert student.batch == control.batch
    assert (student.steps, student.learning_rate) == (control.steps, control.learning_rate) == (100, pytest.approx(0.05))


def test_fewer_labels_than_a_batch_are_refused_with_both_numbers() -> None:
    with pytest.raises(TooFewLabels, match=r"7 labeled training images are fewer than one batch of 8.*lower batch_size to 7"):
        plan_training(TrainingConfig(epochs=1, batch_size=8), num_labeled=7, ratio=0, role="teacher")


def test_validation_is_looked_at_twenty_times_unless_the_recipe_says_otherwise() -> None:
    assert plan_training(TrainingConfig(steps=1000, batch_size=4), num_labeled=9, ratio=0, role="teacher").evaluate_every_steps == 50
    assert plan_training(TrainingConfig(steps=7, batch_size=4), num_labeled=9, ratio=0, role="teacher").evaluate_every_steps == 1


def test_the_average_is_warmed_up_like_tensorflows() -> None:
    assert ema_decay_at(0.9999, 0) == 0.1
    assert ema_decay_at(0.9999, 90) == pytest.approx(0.91)
    assert ema_decay_at(0.9999, 10**7) == 0.9999
    assert ema_decay_at(0.0, 10**7) == 0.0
