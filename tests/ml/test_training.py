"""Training: the same bits after a kill, the right thing chosen, loud when something is wrong."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ml.config import NetworkConfig, NoiseConfig, OptimizerConfig, StudentConfig
from ml.errors import CheckpointDamaged, ClassMismatch, DataError, Diverged, Interrupted, RecipeError, TooFewLabels
from ml.events import Event, OnEvent, ignore, never
from ml.learner import Learner
from ml.prediction import label
from ml.tasks import TrainingTask
from ml.training import Training, train
from ml.training_inputs import gather
from ml.validation import to_dict
from tests.ml.builders_generations import build_manifest
from tests.ml.builders_training import (
    RUNTIME,
    build_recipe,
    build_training,
    label_task,
    select_from,
    student_task,
    teacher_task,
    write_digits,
)

Weights = dict[str, torch.Tensor]


def run(task: TrainingTask, folder: Path, *, on_event: OnEvent = ignore, should_stop: Callable[[], bool] = never) -> Training:
    """All steps of the task, without the export."""
    training = Training(task, gather(task), folder, on_event, should_stop)
    training.run()
    return training


def result(training: Training) -> tuple[Weights, dict[str, object]]:
    """What must be equal to the bit: weights, averages, momenta, and which step was best."""
    state = training.learner.state()
    tensors = {f"{part}.{name}": value for part in ("network", "ema") for name, value in state[part].items()}
    for number, buffers in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in buffers.items() if isinstance(value, torch.Tensor)}
    assert training.best is not None
    return tensors, training.best


def assert_equal_bits(a: Training, b: Training) -> None:
    (ours, our_best), (theirs, their_best) = result(a), result(b)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert our_best == their_best
    best = our_best["step"]
    assert all(map(torch.equal, a.checkpoints.load_best(best).values(), b.checkpoints.load_best(best).values()))


def stop_at(*calls: int) -> Callable[[], bool]:
    """A `should_stop` that says so when it is asked for the n-th time."""
    counter = itertools.count(1)
    return lambda: next(counter) in calls


@pytest.fixture(name="student")
def student_on_three_digits(tmp_path: Path) -> TrainingTask:
    """A student with every kind of noise in bf16, its teacher's labels made by an untrained generation."""
    from tests.ml.builders_generations import build_generation

    data = write_digits(tmp_path / "data", labeled=8, validation=4, test=4, pool=40, classes=3)
    recipe = build_recipe(training=build_training(steps=14, batch_size=8, evaluate_every_steps=4, clip_norm=5.0))
    generation = build_generation(tmp_path / "generation", class_names=("0", "1", "2"))
    label(label_task(data, recipe, generation, tmp_path / "shard.parquet"))
    selected = select_from(data, recipe, tmp_path / "shard.parquet", tmp_path / "selected.parquet", classes=3)
    return student_task(data, recipe, selected, runtime=replace(RUNTIME, precision="bf16"))


def test_two_trainings_with_one_seed_end_with_equal_bits(student: TrainingTask, tmp_path: Path) -> None:
    assert_equal_bits(run(student, tmp_path / "a"), run(student, tmp_path / "b"))


def test_another_seed_ends_with_other_bits(student: TrainingTask, tmp_path: Path) -> None:
    other = replace(student, recipe=replace(student.recipe, seed=4))

    ours, theirs = result(run(student, tmp_path / "a"))[0], result(run(other, tmp_path / "b"))[0]

    assert not torch.equal(ours["ema.fc.weight"], theirs["ema.fc.weight"])


def test_stopped_at_any_step_and_resumed_it_ends_with_the_bits_of_an_undisturbed_one(student: TrainingTask, tmp_path: Path) -> None:
    undisturbed = run(student, tmp_path / "undisturbed")

    # Asked once after each step and once per validation batch: 5 is within the first look at validation.
    for call in (1, 5, 6, 11, 17):
        folder = tmp_path / f"stopped-{call}"
        with pytest.raises(Interrupted):
            run(student, folder, should_stop=stop_at(call))
        assert_equal_bits(undisturbed, run(student, folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"mixing": "pseudo-labels-alone"},
        {"mixing": "pretrain-finetune"},
        {"unlabeled_noise": NoiseConfig(randaugment_operations=0, crop_and_flip=False)},
        {"unlabeled_noise_fade_ratio": 0.7},
    ],
)
def test_every_way_to_show_the_pool_resumes_to_the_bit(student: TrainingTask, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert student.student is not None
    task = replace(student, student=replace(student.student, **fields))
    undisturbed = run(task, tmp_path / "undisturbed")

    with pytest.raises(Interrupted):
        run(task, tmp_path / "stopped", should_stop=stop_at(7))

    assert_equal_bits(undisturbed, run(task, tmp_path / "stopped"))
    assert not torch.equal(result(undisturbed)[0]["ema.fc.weight"], result(run(student, tmp_path / "plain"))[0]["ema.fc.weight"])


def test_a_training_that_an_older_version_began_goes_on(student: TrainingTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints name a digest over the fields that it knew."""
    ours = gather(student).digest

    def as_before(config: object) -> dict[str, Any]:
        later = ("unlabeled_noise", "unlabeled_noise_fade_ratio", "mixing", "finetune_ratio", "distillation")
        return {name: value for name, value in to_dict(config).items() if name not in later}

    monkeypatch.setattr("ml.training_inputs.to_dict", as_before)
    assert gather(student).digest == ours
    monkeypatch.undo()
    assert student.student is not None
    assert gather(replace(student, student=replace(student.student, mixing="pretrain-finetune"))).digest != ours


def test_a_kill_between_two_checkpoints_costs_steps_but_no_bits(student: TrainingTask, tmp_path: Path) -> None:
    undisturbed = run(student, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    with pytest.raises(Interrupted):
        run(student, folder, should_stop=stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        # Past the next best checkpoint, nothing else written.
        run(student, folder, on_event=raise_after_best)

    assert_equal_bits(undisturbed, run(student, folder))


def raise_after_best(event: Event) -> None:
    if event.kind == "metric" and event.data["step"] == 8:
        raise KeyboardInterrupt


def test_a_damaged_last_checkpoint_is_reported_and_costs_no_bits(student: TrainingTask, tmp_path: Path) -> None:
    undisturbed = run(student, tmp_path / "undisturbed")
    folder, events = tmp_path / "damaged", list[Event]()
    for call in (3, 4):
        with pytest.raises(Interrupted):
            run(student, folder, should_stop=stop_at(call))
    os.truncate(folder / "last.ckpt", 1000)

    resumed = run(student, folder, on_event=events.append)

    assert_equal_bits(undisturbed, resumed)
    assert "checkpoint.damaged" in [event.data["code"] for event in events if event.kind == "warning"]


def test_the_checkpoint_of_another_recipe_is_not_gone_on_with(student: TrainingTask, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(student, tmp_path / "a", should_stop=stop_at(2))

    with pytest.raises(CheckpointDamaged, match="another recipe"):
        run(replace(student, recipe=replace(student.recipe, seed=9)), tmp_path / "a")


def test_a_retry_with_smaller_micro_batches_goes_on_with_the_same_checkpoint(student: TrainingTask) -> None:
    assert student.student is not None
    halved = replace(student.student, training=replace(student.student.training, accumulation=2))

    assert gather(student).digest == gather(replace(student, student=halved)).digest


def test_the_test_split_chooses_nothing(student: TrainingTask, tmp_path: Path) -> None:
    assert_equal_bits(run(student, tmp_path / "with"), run(replace(student, test=None), tmp_path / "without"))


def test_a_student_sees_both_kinds_of_images_in_one_forward_pass(student: TrainingTask, tmp_path: Path) -> None:
    training = Training(student, gather(student), tmp_path / "c", ignore, never)
    sizes = []
    training.learner.network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))

    training.run()

    assert sizes == [8 + 2 * 8] * 14


def test_the_network_is_in_train_mode_at_every_step_and_its_average_never(student: TrainingTask, tmp_path: Path) -> None:
    training = Training(student, gather(student), tmp_path / "c", ignore, never)
    modes: dict[str, set[bool]] = {"network": set(), "average": set()}
    training.learner.network.register_forward_pre_hook(lambda module, _: modes["network"].add(module.training))
    training.learner.ema.network.register_forward_pre_hook(lambda module, _: modes["average"].add(module.training))

    training.run()

    assert modes == {"network": {True}, "average": {False}}


def test_a_control_makes_the_students_steps_on_labels_alone(student: TrainingTask, tmp_path: Path) -> None:
    control = run(replace(student, role="control", selected=None, unlabeled=None), tmp_path / "control")
    plan = Training(student, gather(student), tmp_path / "student", ignore, never).plan

    assert (control.plan.steps, control.plan.batch, control.plan.learning_rate) == (plan.steps, plan.batch, plan.learning_rate)
    assert control.plan.batch_unlabeled == 0


def test_a_batch_is_memorized(student: TrainingTask, tmp_path: Path) -> None:
    quiet = NoiseConfig(randaugment_operations=0, crop_and_flip=False)
    task = replace(student, student=replace(student.recipe.students[0], noise=quiet, training=build_training(steps=100, batch_size=8)))
    training = Training(task, gather(task), tmp_path / "c", ignore, never)
    with training._batches(0) as batches:
        batch = next(iter(batches))
    assert batch.soft_UK is not None
    one_hot = torch.nn.functional.one_hot(batch.soft_UK.argmax(-1), 3).float()

    for step in range(100):
        training.learner.step(step, batch._replace(soft_UK=one_hot))

    losses = training.learner.recent_losses()
    assert losses[0].total > 1
    assert losses[-1].labeled < 0.02
    assert losses[-1].unlabeled < 0.02


def test_micro_batches_add_up_to_the_whole_batch(student: TrainingTask, tmp_path: Path) -> None:
    """Without batch norm and model noise only the rounding differs."""
    config = replace(student.recipe.students[0], network=NetworkConfig(architecture="test_vit"), noise=NoiseConfig(), loss="ratio")
    learners: list[Learner] = []
    for accumulation in (1, 4):
        plain = replace(config, training=build_training(batch_size=8, accumulation=accumulation))
        task = replace(student, student=plain, runtime=RUNTIME)
        training = Training(task, gather(task), tmp_path / f"{accumulation}", ignore, never)
        with training._batches(0) as batches:
            training.learner.step(0, next(iter(batches)))
        learners.append(training.learner)

    whole, parts = (learner.network.state_dict() for learner in learners)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)
    assert learners[0].recent_losses()[0] == pytest.approx(learners[1].recent_losses()[0], rel=1e-5)


def test_a_loss_that_is_no_number_ends_with_step_loss_and_rate_and_keeps_the_last_good_checkpoint(
    student: TrainingTask, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(student, tmp_path / "c", should_stop=stop_at(2))
    good = (tmp_path / "c" / "last.ckpt").read_bytes()
    training = Training(student, gather(student), tmp_path / "c", ignore, never)
    learner_rate = training.learner.learning_rate
    # The recipe's own rate until the checkpoint, then one that no network survives.
    training.learner.learning_rate = lambda step: learner_rate(step) if step < 2 else 1e30  # type: ignore[method-assign]

    with pytest.raises(Diverged) as caught:
        training.run()

    details = caught.value.details
    assert (details["step"], details["loss"], details["learning_rate"]) == (3, "nan", 1e30)
    assert details["checkpoint"] == str(tmp_path / "c" / "last.ckpt")
    assert (tmp_path / "c" / "last.ckpt").read_bytes() == good


def test_a_smaller_student_is_warned_about_or_refused_as_the_recipe_says(student: TrainingTask, tmp_path: Path) -> None:
    events: list[Event] = []
    smaller = replace(student, teacher_parameters=10**9)

    training = Training(smaller, gather(smaller), tmp_path / "c", events.append, never)

    assert events[0].data["code"] == "student.smaller_than_teacher"
    assert "fewer than its teacher's 1,000,000,000" in training.warnings[0]
    refusing = replace(student.recipe, iterations=replace(student.recipe.iterations, smaller_student="refuse"))
    with pytest.raises(RecipeError, match="refuses"):
        Training(replace(smaller, recipe=refusing), gather(smaller), tmp_path / "c", ignore, never)


def test_a_handful_of_validation_images_is_warned_about(student: TrainingTask, tmp_path: Path) -> None:
    events: list[Event] = []

    training = Training(student, gather(student), tmp_path / "c", events.append, never)

    number = len(gather(student).validation)
    assert [event.data["code"] for event in events] == ["validation.few_images"]
    assert training.warnings == [events[0].data["message"]]
    assert training.warnings[0].startswith(f"{number} validation images choose checkpoint and temperature: one of them is 8 points")


def test_enough_validation_images_are_not_warned_about(student: TrainingTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.training._FEW_VALIDATION_IMAGES", len(gather(student).validation))

    training = Training(student, gather(student), tmp_path / "c", ignore, never)

    assert training.warnings == []


def test_what_does_not_fit_is_refused_before_the_first_step(student: TrainingTask, tmp_path: Path) -> None:
    two_digits = write_digits(tmp_path / "two", labeled=2, validation=1, test=1, pool=5, classes=2)

    with pytest.raises(RecipeError, match="student config"):
        gather(replace(student, student=None))
    with pytest.raises(DataError, match="pseudo-labels"):
        gather(replace(student, selected=None))
    with pytest.raises(ClassMismatch):
        gather(replace(student, labeled=str(two_digits / "labeled.parquet")))
    with pytest.raises(TooFewLabels, match="fewer than one batch"):
        run(replace(student, role="teacher", labeled=str(few_labels(tmp_path)), validation=None), tmp_path / "c")


def few_labels(folder: Path) -> Path:
    data = write_digits(folder / "few", labeled=3, validation=1, test=1, pool=5, classes=3)
    build_manifest(data / "labeled", data / "labeled.parquet", kind="labeled")
    return data / "labeled.parquet"


def test_validation_is_cut_from_the_labels_when_none_is_given(student: TrainingTask) -> None:
    inputs = gather(replace(student, validation=None))

    keys = set(inputs.labeled.column("key")), set(inputs.validation.column("key"))
    assert (len(inputs.labeled), len(inputs.validation)) == (18, 6)
    assert not keys[0] & keys[1]


def test_digits_train_a_teacher_whose_labels_train_a_student_that_opens_anywhere(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    optimizer = OptimizerConfig(learning_rate=0.05, weight_decay=1e-4)
    recipe = build_recipe(training=build_training(steps=100, evaluate_every_steps=25, optimizer=optimizer))
    events: list[Event] = []

    teacher = train(teacher_task(data, recipe), checkpoint_dir=tmp_path / "c0", output_dir=tmp_path / "g0", on_event=events.append)
    label(label_task(data, recipe, tmp_path / "g0", tmp_path / "shard.parquet"))
    selected = select_from(data, recipe, tmp_path / "shard.parquet", tmp_path / "selected.parquet")
    task = student_task(data, recipe, selected, teacher_parameters=teacher["num_parameters"])
    student = train(task, checkpoint_dir=tmp_path / "c1", output_dir=tmp_path / "g1")

    assert teacher["test"]["top1"] > 0.6
    assert student["test"]["top1"] > 0.7
    for metrics in (teacher, student):
        assert metrics["onnx_parity"]["top1_agreement"] == 1.0
        assert metrics["onnx_parity"]["max_probability_difference"] < 1e-4
        assert metrics["validation"]["num_images"] == 40
    assert [e.data["stage"] for e in events if e.kind == "stage"] == ["training", "evaluating", "exporting"]
    assert {"validation_predictions.parquet", "test_predictions.parquet"} <= set(os.listdir(tmp_path / "g1"))
    # Asked again, the finished generation answers at once.
    assert train(task, checkpoint_dir=tmp_path / "unused", output_dir=tmp_path / "g1") == student
    assert not (tmp_path / "unused").exists()


def test_a_student_may_start_from_its_teachers_weights(student: TrainingTask, tmp_path: Path) -> None:
    assert isinstance(student.student, StudentConfig)
    network = NetworkConfig(architecture="test_resnet", initial_weights="teacher")
    warm = replace(student, student=replace(student.student, network=network), initial_weights=str(tmp_path / "generation"))

    training = Training(warm, gather(warm), tmp_path / "c", ignore, never)

    from ml.models import read_tensors

    ours, theirs = training.learner.network.state_dict(), read_tensors(tmp_path / "generation")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_training_resumes_to_the_bit_and_its_weights_keep_their_names(
    student: TrainingTask, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    compiled = replace(student, runtime=replace(student.runtime, compile=True, precision=precision))
    undisturbed = run(compiled, tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        run(compiled, tmp_path / "stopped", should_stop=stop_at(6))

    resumed = run(compiled, tmp_path / "stopped")

    assert_equal_bits(undisturbed, resumed)
    plain = Training(student, gather(student), tmp_path / "plain", ignore, never)
    assert resumed.learner.state()["network"].keys() == plain.learner.state()["network"].keys()


def test_a_long_look_at_validation_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.training._LOOK_SECONDS", 0.0)
    data = write_digits(tmp_path / "data", classes=3, pool=3)
    events: list[Event] = []

    run(teacher_task(data, build_recipe(training=build_training(steps=2, evaluate_every_steps=2))), tmp_path / "c", on_event=events.append)

    detours = [event.data for event in events if event.kind == "progress" and event.data.get("stage") == "evaluating"]
    assert [(data["done"], data["total"], data["unit"]) for data in detours] == [(12, 12, "images")]
