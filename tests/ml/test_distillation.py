"""Knowledge distillation: what the loss is, that its gradient does not fade with T, and a small student that imitates its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ml import losses
from ml.calibration import softmax
from ml.config import DistillationConfig, StudentConfig
from ml.errors import ClassMismatch, DataError, Interrupted, RecipeError
from ml.models import load_generation
from ml.prediction import label
from ml.tasks import TrainingTask
from ml.training_inputs import gather
from tests.ml.builders_generations import build_generation
from tests.ml.builders_training import build_recipe, build_training, label_task, select_from, student_task, write_digits
from tests.ml.test_training import assert_equal_bits, result, run, stop_at

DISTILLED = DistillationConfig(temperature=4.0, labels_ratio=0.25)


def gradient_of(temperature: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # Far from certain, where the softened softmax is about linear.
    student, teacher = (0.01 * torch.randn(64, 10, generator=generator) for _ in range(2))
    student.requires_grad_()
    losses.distillation(student, torch.softmax(teacher, -1), temperature=temperature).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return student.grad


def test_the_gradient_does_not_fade_with_the_temperature() -> None:
    at_one = gradient_of(1.0).norm()

    for temperature in (2.0, 8.0, 32.0):
        torch.testing.assert_close(gradient_of(temperature).norm(), at_one, rtol=0.02, atol=0)


def test_the_loss_is_the_divergence_of_the_softened_distributions_times_the_square_of_the_temperature() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(logits / 3, -1) for logits in (teacher, student))

    found = losses.distillation(student.float(), torch.softmax(teacher, -1).float(), temperature=3.0)

    torch.testing.assert_close(found.double(), 9 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_who_equals_the_teacher_learns_nothing_from_it(temperature: float) -> None:
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    probs = torch.softmax(logits, -1)

    for loss in (
        lambda student: losses.distillation(student, probs, temperature=temperature),
        lambda student: losses.pseudo_label_cross_entropy(student, probs, kind="soft"),
    ):
        student = logits.clone().requires_grad_()
        loss(student).backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-7


@pytest.fixture(name="task")
def a_distilled_student(tmp_path: Path) -> TrainingTask:
    data = write_digits(tmp_path / "data", labeled=8, validation=4, test=4, pool=40, classes=3)
    recipe = build_recipe(training=build_training(steps=10, batch_size=8, evaluate_every_steps=4), distillation=DISTILLED)
    generation = build_generation(tmp_path / "generation", class_names=("0", "1", "2"))
    label(label_task(data, recipe, generation, tmp_path / "shard.parquet"))
    selected = select_from(data, recipe, tmp_path / "shard.parquet", tmp_path / "selected.parquet", classes=3)
    return student_task(data, recipe, selected, teacher=str(generation))


def test_a_distilled_student_trains_and_resumes_to_the_bit(task: TrainingTask, tmp_path: Path) -> None:
    undisturbed = run(task, tmp_path / "undisturbed")

    with pytest.raises(Interrupted):
        run(task, tmp_path / "stopped", should_stop=stop_at(7))

    assert_equal_bits(undisturbed, run(task, tmp_path / "stopped"))
    assert task.student is not None
    plain = run(replace(task, student=replace(task.student, distillation=None)), tmp_path / "plain")
    assert not torch.equal(result(undisturbed)[0]["ema.fc.weight"], result(plain)[0]["ema.fc.weight"])


def test_the_teacher_says_of_each_labeled_image_what_it_would_as_a_pseudo_label(task: TrainingTask, tmp_path: Path) -> None:
    from ml.training import Training

    training = Training(task, gather(task), tmp_path / "work", lambda _event: None, lambda: False)

    probs_NK = training._imitated_probs()

    assert probs_NK is not None
    teacher = load_generation(Path(task.teacher or ""), torch.device("cpu"))
    from ml.pixels import read_image, weak_view
    from ml.prediction import forward

    views = np.stack([weak_view(read_image(place), teacher.preprocessing) for place in training.inputs.labeled.locations()])
    expected = softmax(forward(teacher.network, views, teacher.preprocessing, training.exact), 1.0)
    np.testing.assert_allclose(probs_NK, expected, atol=1e-5)
    assert probs_NK.shape == (len(training.inputs.labeled), 3)


def test_a_distilled_student_without_a_teacher_or_with_a_strange_one_is_refused(task: TrainingTask, tmp_path: Path) -> None:
    other = build_generation(tmp_path / "other", class_names=("0", "1", "7"))

    with pytest.raises(DataError, match="needs its teacher"):
        gather(replace(task, teacher=None))
    with pytest.raises(ClassMismatch, match="guesses classes 0, 1, 7, the labels are for 0, 1, 2"):
        gather(replace(task, teacher=str(other)))


@pytest.mark.parametrize("fields", [{"pseudo_labels": "hard"}, {"temperature": 0.5}])
def test_distillation_has_its_own_temperature_and_whole_distributions(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="distillation needs soft pseudo-labels at temperature 1"):
        StudentConfig(distillation=DISTILLED, **fields)  # type: ignore[arg-type]
