"""Train one generation: read from top to bottom, `train` is what happens.

A training is a function of its task: killed at any step and started again it ends, on the CPU, with the same bits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml import calibration, models
from ml.checkpoints import CheckpointFolder, State
from ml.config import StudentConfig
from ml.data import TrainingBatches
from ml.determinism import torch_seed
from ml.devices import apply_runtime, host_facts
from ml.errors import DataError, Diverged, Interrupted, RecipeError
from ml.evaluation import label_ranks
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.export import PARITY_IMAGES, write_generation
from ml.files import folder_written_aside
from ml.learner import Learner, noise_of_network
from ml.manifest import Manifest
from ml.pixels import Preprocessing
from ml.prediction import Predictions, WeakViews, batch_for, measure, predict
from ml.schedules import plan_training
from ml.tasks import TrainingTask
from ml.training_inputs import TrainingInputs, gather

LOOK_EVERY_STEPS = 50
"""Steps between looks at the losses on the device; a look waits for it."""
_LOOK_SECONDS = 2.0
_EVALUATION_BATCH = 256
_FEW_VALIDATION_IMAGES = 30
"""Below it one image is more than 3 points of accuracy, and the 95 % interval spans more than 30 at an accuracy of one half."""


def train(
    task: TrainingTask, *, checkpoint_dir: Path, output_dir: Path, on_event: OnEvent = ignore, should_stop: ShouldStop = never
) -> dict[str, Any]:
    """Train, choose the best checkpoint on validation, measure, export to `output_dir`; return the metrics.

    Goes on where `checkpoint_dir` says an earlier attempt stopped. When `output_dir` holds the finished generation of the
    same task, its metrics are returned and nothing is done. Raises Interrupted after a checkpoint when `should_stop` says so,
    Diverged when the loss is not a number, and RecipeError, DataError or WeightsError before the first step.
    """
    apply_runtime(task.runtime)
    inputs = gather(task)
    finished = _finished(output_dir, inputs.digest)
    if finished is not None:
        return finished
    training = Training(task, inputs, checkpoint_dir, on_event, should_stop)
    training.run()
    return training.finish(output_dir)


def _finished(output_dir: Path, digest: str) -> dict[str, Any] | None:
    path = output_dir / "metrics.json"
    if not path.is_file():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics if metrics.get("training_digest") == digest else None


class Training:
    """One training while it runs: the learner, what it is fed, and what is known so far."""

    def __init__(
        self, task: TrainingTask, inputs: TrainingInputs, checkpoint_dir: Path, on_event: OnEvent, should_stop: ShouldStop
    ) -> None:
        self.task, self.inputs, self.on_event, self.should_stop = task, inputs, on_event, should_stop
        self.config = inputs.config
        student = self.student = self.config if isinstance(self.config, StudentConfig) else StudentConfig()
        self.plan = plan_training(
            self.config.training,
            num_labeled=len(inputs.labeled),
            ratio=inputs.ratio,
            role=task.role,
            mixing=student.mixing,
            finetune_ratio=student.finetune_ratio,
        )
        self.preprocessing = Preprocessing.from_config(task.recipe.image)
        self.exact = replace(task.runtime, precision="fp32")
        torch.manual_seed(torch_seed(task.recipe.seed, "initial weights", task.iteration))
        network = models.create_network(
            self.config.network,
            num_classes=len(inputs.class_names),
            noise=noise_of_network(self.config, task.role),
            image=task.recipe.image,
            weights_dir=task.initial_weights,
        )
        self.num_parameters = models.count_parameters(network)
        self.warnings = [*self._compare_with_teacher(), *self._count_validation()]
        self.learner = Learner(
            network,
            self.config,
            self.plan,
            role=task.role,
            preprocessing=self.preprocessing,
            training_side=task.recipe.image.size,
            runtime=task.runtime,
            seed=torch_seed(task.recipe.seed, "training", task.iteration),
        )
        self.checkpoints = CheckpointFolder(checkpoint_dir, inputs.digest)
        self.validation = self._views(inputs.validation, cache_bytes=task.runtime.cache_bytes // 4)
        self.best: dict[str, Any] | None = None
        self.evaluated_step = 0
        self.seconds = 0.0
        self._saved_at = self._looked_at = time.monotonic()
        self._loss = 0.0

    def run(self) -> None:
        """Make all steps that are left; afterwards `self.best` names the best one."""
        self.on_event(Event(kind="stage", data={"stage": "training"}))
        step = self._resume()
        self._evaluate_when_due(step)
        if step == self.plan.steps:
            return
        with self._batches(step) as batches:
            for batch in batches:
                self.learner.step(step, batch)
                step += 1
                if step % LOOK_EVERY_STEPS == 0 or time.monotonic() - self._looked_at >= _LOOK_SECONDS:
                    self._look(step)
                self._evaluate_when_due(step)
                if self.should_stop():
                    self._interrupt(step)
                if step == self.plan.steps or time.monotonic() - self._saved_at >= self.config.training.checkpoint_every_seconds:
                    self._save(step)

    def _batches(self, start_step: int) -> TrainingBatches:
        return TrainingBatches(
            labeled=self.inputs.labeled,
            class_names=self.inputs.class_names,
            selected=self.inputs.selected,
            unlabeled=self.inputs.unlabeled,
            image=self.task.recipe.image,
            noise=self.config.noise,
            plan=self.plan,
            seed=torch_seed(self.task.recipe.seed, "batches", self.task.iteration),
            start_step=start_step,
            runtime=self.task.runtime,
            unlabeled_noise=self.student.unlabeled_noise,
            fade_ratio=self.student.unlabeled_noise_fade_ratio,
            labeled_probs=self._imitated_probs(),
        )

    def _imitated_probs(self) -> NDArray[np.float32] | None:
        """What the teacher of a distilled student says of the labeled images' weak views, [N, K], at temperature 1; None for others."""
        if self.task.role != "student" or self.student.distillation is None:
            return None
        assert self.task.teacher is not None, "gather has refused that"
        teacher = models.load_generation(Path(self.task.teacher), torch.device(self.task.runtime.device))
        batch_size = batch_for(self.task.runtime.device, teacher.preprocessing.size, _EVALUATION_BATCH)
        views = WeakViews(self.inputs.labeled, teacher.preprocessing, batch_size=batch_size)
        num_classes = len(self.inputs.class_names)
        found = predict(teacher.network, views, num_classes=num_classes, runtime=self.exact, should_stop=self.should_stop)
        gone = [key for key, status in zip(self.inputs.labeled.column("key"), found.statuses, strict=True) if status != "ok"]
        if gone:
            raise DataError(f"{len(gone)} labeled images cannot be read any more, for example {gone[0]}", keys=gone[:100])
        return calibration.softmax(found.logits, 1.0).astype(np.float32)

    def _resume(self) -> int:
        """Load the newest complete checkpoint; return the number of steps already made."""
        state, damaged = self.checkpoints.load_last()
        for error in damaged:
            self._warn("checkpoint.damaged", f"{error}; going on from the one before")
        if state is None:
            return 0
        self.learner.load(state["learner"])
        self.best, self.evaluated_step, self.seconds = state["best"], state["evaluated_step"], state["seconds"]
        return int(state["step"])

    def _look(self, step: int) -> None:
        """Fetch the losses since the last look: report them, or raise Diverged for the first that is not a number."""
        losses = self.learner.recent_losses()
        for index, loss in enumerate(losses):
            if not np.isfinite(loss.total):
                self._diverge(step - len(losses) + index, loss.total)
        now = time.monotonic()
        elapsed, self._looked_at = now - self._looked_at, now
        self.seconds += elapsed
        if not losses:
            return
        self._loss = losses[-1].total
        means = np.mean(losses, axis=0)
        data = {
            "step": step,
            "loss": float(means[0]),
            "loss_labeled": float(means[1]),
            "learning_rate": self.learner.learning_rate(step - 1),
        }
        if self.plan.batch_unlabeled:
            data["loss_unlabeled"] = float(means[2])
        self.on_event(Event(kind="metric", data=data))
        rate = len(losses) / max(elapsed, 1e-9)
        progress = {
            "done": step,
            "total": self.plan.steps,
            "unit": "steps",
            "images_per_second": rate * self.plan.batch,
            "eta_seconds": (self.plan.steps - step) / rate,
        }
        self.on_event(Event(kind="progress", data=progress))

    def _diverge(self, step: int, loss: float) -> None:
        """Raise Diverged for update number `step`, whose loss, or weights afterwards, are no numbers."""
        rate = self.learner.learning_rate(step)
        kept = self.checkpoints.last if self.checkpoints.last.exists() else None
        message = f"diverged at step {step}: loss {loss:.6g}, learning rate {rate:.6g}; a lower rate or clip_norm may help"
        # As text, because JSON has no word for it.
        raise Diverged(message, step=step, loss=str(loss), learning_rate=rate, checkpoint=None if kept is None else str(kept))

    def _evaluate_when_due(self, step: int) -> None:
        """Look at validation with the averaged weights where the plan says so, once per step even across a kill."""
        due = step > 0 and (step % self.plan.evaluate_every_steps == 0 or step == self.plan.steps)
        if not due or self.evaluated_step == step:
            return
        self._look(step)
        try:
            found = self._predict(self.validation)
        except Interrupted:
            self._interrupt(step)
        self.learner.network.train()
        logits_MK, labels_M = self._labeled_rows(found, self.inputs.validation)
        if not np.isfinite(logits_MK).all():
            self._diverge(step - 1, self._loss)
        top1 = float((label_ranks(logits_MK, labels_M) == 0).mean())
        nll = calibration.negative_log_likelihood(logits_MK, labels_M)
        self.evaluated_step = step
        self.on_event(Event(kind="metric", data={"step": step, "validation_top1": top1, "validation_nll": nll}))
        # Few validation images make many ties; the likelihood tells them apart, and the earlier wins what is left.
        if self.best is None or (top1, -nll) > (self.best["top1"], -self.best["nll"]):
            self.best = {"step": step, "top1": top1, "nll": nll}
            self.checkpoints.save_best(step, self.learner.ema.network.state_dict())
        # What evaluation took is not the speed of training.
        self._looked_at = time.monotonic()

    def _interrupt(self, step: int) -> None:
        self._save(step)
        raise Interrupted(f"stopped after step {step} of {self.plan.steps}; the checkpoint holds it", step=step)

    def _save(self, step: int) -> None:
        """Write the full state; refuses, as Diverged, one that nothing good could come of."""
        self._look(step)
        if not self.learner.is_finite():
            self._diverge(step - 1, self._loss)
        state: State = {
            "step": step,
            "learner": self.learner.state(),
            "best": self.best,
            "evaluated_step": self.evaluated_step,
            "seconds": self.seconds,
        }
        path = self.checkpoints.save_last(state, best_step=None if self.best is None else self.best["step"])
        self._saved_at = self._looked_at = time.monotonic()
        self.on_event(Event(kind="checkpoint", data={"step": step, "path": str(path)}))

    def finish(self, output_dir: Path) -> dict[str, Any]:
        """Take the best average, fit its temperature on validation, measure, export; return the metrics."""
        assert self.best is not None, "the last step is always evaluated"
        self.on_event(Event(kind="stage", data={"stage": "evaluating"}))
        network = self.learner.ema.network
        network.load_state_dict(self.checkpoints.load_best(self.best["step"]))
        on_validation = self._predict(self.validation)
        temperature = calibration.fit_temperature(*self._labeled_rows(on_validation, self.inputs.validation))
        on_test = None if self.inputs.test is None else self._predict(self._views(self.inputs.test))
        with folder_written_aside(output_dir) as folder:
            measured: dict[str, Any] = {"validation": None, "test": None}
            for split, found, manifest in (
                ("validation", on_validation, self.inputs.validation),
                ("test", on_test, self.inputs.test),
            ):
                if found is not None and manifest is not None:
                    path = folder / f"{split}_predictions.parquet"
                    measured[split] = measure(found, manifest, self.inputs.class_names, temperature=temperature, predictions=path)
            self.on_event(Event(kind="stage", data={"stage": "exporting"}))
            return write_generation(
                network.cpu(),
                folder,
                class_names=self.inputs.class_names,
                preprocessing=self.preprocessing,
                temperature=temperature,
                images_MHWC=self.validation.first_images(PARITY_IMAGES),
                metrics=self._facts() | measured | {"temperature": temperature},
                lineage=self.task.lineage,
            )

    def _facts(self) -> dict[str, Any]:
        """What is known about the training, apart from what it led to."""
        assert self.best is not None
        images_seen = self.plan.steps * self.plan.batch
        return {
            "role": self.task.role,
            "iteration": self.task.iteration,
            "architecture": self.config.network.architecture,
            "initial_weights": self.config.network.initial_weights,
            "loss": getattr(self.config, "loss", None) if self.task.role == "student" else None,
            "num_parameters": self.num_parameters,
            "teacher_parameters": self.task.teacher_parameters,
            "num_labeled": len(self.inputs.labeled),
            "num_unlabeled": 0 if self.inputs.selected is None else len(self.inputs.selected),
            "steps": self.plan.steps,
            "images_seen": images_seen,
            "best_step": self.best["step"],
            "training_seconds": self.seconds,
            "images_per_second": images_seen / max(self.seconds, 1e-9),
            "training_digest": self.inputs.digest,
            "warnings": self.warnings,
            "host": host_facts(self.task.runtime),
        }

    def _compare_with_teacher(self) -> list[str]:
        """Warn about, or refuse, a student with fewer parameters than its teacher: the paper's is equal or larger."""
        of_teacher = self.task.teacher_parameters
        if self.task.role != "student" or of_teacher is None or self.num_parameters >= of_teacher:
            return []
        message = f"the student has {self.num_parameters:,} parameters, fewer than its teacher's {of_teacher:,}"
        if self.task.recipe.iterations.smaller_student == "refuse":
            raise RecipeError(f"{message}, and the recipe refuses that", pointer="/iterations/smaller_student")
        return [self._warn("student.smaller_than_teacher", message)]

    def _count_validation(self) -> list[str]:
        """Warn that a handful of images is to choose the best checkpoint, the temperature, and what may be promoted."""
        number = len(self.inputs.validation)
        if self.task.role == "control" or number >= _FEW_VALIDATION_IMAGES:
            return []
        message = (
            f"{number} validation images choose checkpoint and temperature: one of them is {100 / number:.0f} points of accuracy; "
            "give more labels, a larger validation_ratio or a validation dataset"
        )
        return [self._warn("validation.few_images", message)]

    def _warn(self, code: str, message: str) -> str:
        self.on_event(Event(kind="warning", data={"code": code, "message": message}))
        return message

    def _views(self, manifest: Manifest, *, cache_bytes: int = 0) -> WeakViews:
        size = batch_for(self.task.runtime.device, self.preprocessing.size, _EVALUATION_BATCH)
        return WeakViews(manifest, self.preprocessing, batch_size=size, cache_bytes=cache_bytes)

    def _predict(self, views: WeakViews) -> Predictions:
        """The averaged weights' logits, always in fp32."""
        return predict(
            self.learner.ema.network,
            views,
            num_classes=len(self.inputs.class_names),
            runtime=self.exact,
            on_rows=self._heard(views.num_rows()),
            should_stop=self.should_stop,
        )

    def _heard(self, total: int) -> Callable[[int], None]:
        """A listener for `predict`: a long look at validation must not be taken for a training that hangs."""
        started = told = time.monotonic()

        def on_rows(done: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= _LOOK_SECONDS:
                told = now
                rate = done / max(now - started, 1e-9)
                data = {"stage": "evaluating", "done": done, "total": total, "unit": "images", "images_per_second": rate}
                self.on_event(Event(kind="progress", data=data))

        return on_rows

    def _labeled_rows(self, found: Predictions, manifest: Manifest) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Logits and labels of the readable rows."""
        readable = [row for row, status in enumerate(found.statuses) if status == "ok"]
        return found.logits, np.asarray(manifest.take(readable).class_indices(self.inputs.class_names), np.int64)
