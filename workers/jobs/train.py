"""Train one generation or its control, evaluate and export it."""

from __future__ import annotations

import json
from dataclasses import replace

from ml.config import Recipe, StudentConfig, TrainingConfig
from ml.tasks import TrainingTask
from ml.validation import build
from workers.jobs import Made, Work
from workers.jobs.runtime import settle_runtime

_PATHS = ("labeled", "validation", "test", "unlabeled", "selected", "initial_weights", "teacher")


def run(work: Work) -> Made:
    """Input: what TrainingTask names. The files are those of an exported generation."""
    task = build_task(work)
    from ml.training import train

    output = work.directory / "generation"
    metrics = train(
        task,
        checkpoint_dir=work.directory / "checkpoints",
        output_dir=output,
        on_event=work.on_event,
        should_stop=work.should_stop,
    )
    files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    class_names = json.loads((output / "class_names.json").read_text(encoding="utf-8"))
    return Made(files=files, result={"metrics": metrics, "class_names": class_names, "lineage": task.lineage})


def build_task(work: Work) -> TrainingTask:
    """The task, with its runtime resolved and, after running out of memory, twice the micro-batches."""
    recipe = build(Recipe, work.input["recipe"])
    student = work.input["student"] and build(StudentConfig, work.input["student"])
    runtime = settle_runtime(work)
    if work.halve_micro_batch:
        recipe = replace(recipe, teacher=replace(recipe.teacher, training=_halved(recipe.teacher.training)))
        student = student and replace(student, training=_halved(student.training))
    return TrainingTask(
        role=work.input["role"],
        iteration=work.input["iteration"],
        recipe=recipe,
        runtime=runtime,
        student=student,
        teacher_parameters=work.input["teacher_parameters"],
        lineage=work.input["lineage"],
        **{name: work.input[name] for name in _PATHS},
    )


def _halved(training: TrainingConfig) -> TrainingConfig:
    twice = 2 * training.accumulation
    return replace(training, accumulation=twice) if training.batch_size % twice == 0 and twice <= 1024 else training
