"""What a training task names, opened and checked: manifests, pseudo-labels, the config of its role, and their common digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from ml.config import StudentConfig, TeacherConfig
from ml.errors import ClassMismatch, DataError, RecipeError
from ml.manifest import Manifest, split_validation
from ml.models import WEIGHTS
from ml.selection import SelectedLabels
from ml.tasks import TrainingTask
from ml.validation import to_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingInputs:
    """Everything that a training reads, apart from the pixels."""

    config: TeacherConfig | StudentConfig
    """Network, noise and training of the task's role."""
    ratio: int
    """r of the student, and of the student that a control stands beside; 0 for a teacher."""
    labeled: Manifest
    validation: Manifest
    test: Manifest | None
    unlabeled: Manifest | None
    selected: SelectedLabels | None
    class_names: tuple[str, ...]
    digest: str
    """Names everything that the weights depend on: checkpoints of another digest are not this training's."""


def gather(task: TrainingTask) -> TrainingInputs:
    """Open what the task names; RecipeError or DataError when something is missing or does not fit."""
    if task.role != "teacher" and task.student is None:
        raise RecipeError(f"a {task.role} needs the iteration's student config", pointer="/students")
    if task.role == "student" and (task.selected is None or task.unlabeled is None):
        raise DataError("a student needs selected pseudo-labels and the manifest of their images")
    if task.role == "student" and task.student is not None and task.student.distillation is not None:
        _check_teacher(task)
    config = task.recipe.teacher if task.role == "teacher" or task.student is None else task.student
    everything = Manifest.read(task.labeled).usable()
    class_names = everything.class_names
    if task.validation is None:
        labeled, validation = split_validation(everything, task.recipe.validation_ratio, task.recipe.seed)
    else:
        labeled, validation = everything, Manifest.read(task.validation).usable()
    test = None if task.test is None else Manifest.read(task.test)
    for manifest in (validation, test):
        if manifest is not None:
            # Raises ClassMismatch now, not after hours of training.
            manifest.usable().class_indices(class_names)
    if len(validation) == 0:
        raise DataError("there is no readable validation image to choose the best checkpoint with")
    is_student = task.role == "student"
    selected = SelectedLabels.read(task.selected) if is_student and task.selected else None
    if selected is not None and selected.class_names != class_names:
        message = f"the pseudo-labels are for classes {', '.join(selected.class_names[:5])}, the labels for {', '.join(class_names[:5])}"
        raise ClassMismatch(message, found=list(selected.class_names), expected=list(class_names))
    return TrainingInputs(
        config=config,
        ratio=config.ratio if isinstance(config, StudentConfig) else 0,
        labeled=labeled,
        validation=validation,
        test=test,
        unlabeled=Manifest.read(task.unlabeled) if is_student and task.unlabeled else None,
        selected=selected,
        class_names=class_names,
        digest=_digest(task, config, labeled, validation),
    )


def _check_teacher(task: TrainingTask) -> None:
    """DataError or ClassMismatch unless a distilled student has a teacher that guesses the same classes."""
    if task.teacher is None:
        raise DataError("a distilled student needs its teacher: the folder of the generation that made its pseudo-labels")
    path = Path(task.teacher) / "class_names.json"
    try:
        found = tuple(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{task.teacher} is no exported generation: {error}", path=str(path)) from error
    expected = Manifest.read(task.labeled).class_names
    if found != expected:
        message = f"the teacher guesses classes {', '.join(found[:5])}, the labels are for {', '.join(expected[:5])}"
        raise ClassMismatch(message, found=list(found), expected=list(expected))


def _digest(task: TrainingTask, config: TeacherConfig | StudentConfig, labeled: Manifest, validation: Manifest) -> str:
    """SHA-256, hex, over what decides the weights.

    Left out is what does not: loaders, caches, how often a checkpoint is written, and how many micro-batches a step has,
    which a retry after running out of memory may double.
    """
    words: dict[str, Any] = {
        "seed": task.recipe.seed,
        "role": task.role,
        "iteration": task.iteration,
        "image": to_dict(task.recipe.image),
        "config": to_dict(config),
        "runtime": {name: getattr(task.runtime, name) for name in ("device", "precision", "num_threads", "compile")},
        "labeled": labeled.digest(),
        "validation": validation.digest(),
        "initial_weights": _of_file(Path(task.initial_weights) / WEIGHTS) if task.initial_weights else None,
    }
    if task.role == "student":
        words |= {"selected": _of_file(task.selected), "unlabeled": _of_file(task.unlabeled)}
        if task.student is not None and task.student.distillation is not None and task.teacher is not None:
            words["teacher"] = _of_file(Path(task.teacher) / WEIGHTS)
    for name in ("accumulation", "checkpoint_every_seconds"):
        del words["config"]["training"][name]
    # What an older version did not know, at its default, changes nothing: a training that it began goes on.
    for name, default in _LATER.items():
        if name in words["config"] and words["config"][name] == default:
            del words["config"][name]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


_LATER = {
    name: getattr(StudentConfig(), name)
    for name in ("unlabeled_noise", "unlabeled_noise_fade_ratio", "mixing", "finetune_ratio", "distillation")
}


def _of_file(path: str | Path | None) -> str | None:
    if path is None or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
