"""The whole loop in one process: folders in, generations out, without a server. `python -m ml run` is its door.

Everything lies in one output folder and every finished piece is left alone, so the same command goes on after a kill:

    manifests/{labeled,unlabeled,test,validation}.parquet     what was read, with reports beside
    generation-0/                                             the first teacher
    iteration-1/shards/*.parquet, selected.parquet            its guesses, and which of them were chosen
    generation-1/, control-1/                                 the student, and its control
    recipe.json, folders.json, runtime.json                   what this folder belongs to
    lineage.json                                              every generation with its figures
    work/                                                     checkpoints
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml.config import Recipe, RuntimeConfig
from ml.errors import ClassMismatch, Leakage, RecipeError
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.files import write_bytes
from ml.ingestion import find_leakage, scan
from ml.manifest import Kind, Manifest, split_validation
from ml.schedules import check_batches
from ml.self_training import GenerationRecord, IterationPlan, Stop, check_thresholds, next_iteration
from ml.sources import locate
from ml.tasks import LabelingTask, SelectionTask, TrainingTask
from ml.validation import to_dict, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    """Where a local run finds its images, here or in S3, and leaves its results."""

    labeled: Path | str
    """One folder per class."""
    unlabeled: Path | str
    """Flat or nested."""
    output: Path
    test: Path | str | None = None
    """One folder per class; only reported."""
    validation: Path | str | None = None
    """One folder per class; None cuts it from the labeled images."""

    def inputs(self) -> dict[str, str | None]:
        """The folders that are read, resolved."""
        named = {"labeled": self.labeled, "unlabeled": self.unlabeled, "test": self.test, "validation": self.validation}
        return {name: None if path is None else locate(path) for name, path in named.items()}


class LocalRun:
    """One run of a recipe over four folders."""

    def __init__(self, folders: Folders, recipe: Recipe, *, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> None:
        if recipe.labeling.selection_model is not None:
            message = "labeling.selection_model names a generation of the service and works there only; leave it out of a local run"
            raise RecipeError(message, pointer="/labeling/selection_model")
        self.folders = folders
        self.recipe = recipe
        self.on_event = on_event
        self.should_stop = should_stop
        self.lineage: list[dict[str, Any]] = []
        self._runtime: RuntimeConfig | None = None

    def run(self) -> list[dict[str, Any]]:
        """Train generation 0, then iterate until `next_iteration` says stop; returns the lineage, oldest first."""
        self.folders.output.mkdir(parents=True, exist_ok=True)
        belongs_to = {"recipe": to_json(self.recipe), "folders": json.dumps(self.folders.inputs(), indent=1)}
        self._refuse_others(belongs_to)
        self._read_folders()
        self._check_labels()
        # Written when nothing is refused any more: a slip must not use the folder up.
        for name, text in belongs_to.items():
            write_bytes(self.folders.output / f"{name}.json", f"{text}\n".encode())
        history = [self._train("teacher", 0, None)]
        while True:
            decided = next_iteration(history, self.recipe)
            if isinstance(decided, Stop):
                self.on_event(Event(kind="stage", data={"stage": "done", "reason": decided.message}))
                return self.lineage
            history.append(self._iterate(decided, history))

    def _refuse_others(self, belongs_to: Mapping[str, str]) -> None:
        """An output folder belongs to one recipe and its input folders: going on with others would mix two experiments."""
        for name, text in belongs_to.items():
            path = self.folders.output / f"{name}.json"
            if path.exists() and path.read_bytes() != f"{text}\n".encode():
                what = {"recipe": "with another recipe", "folders": "over other folders"}[name]
                raise FileExistsError(f"{self.folders.output} holds a run {what}; take another --out, or what is in {path}")

    def _check_labels(self) -> None:
        """Refuse at once what a training would refuse later: fewer labels than a batch."""
        labeled = Manifest.read(self._manifest("labeled"))
        training = labeled if self._has("validation") else split_validation(labeled, self.recipe.validation_ratio, self.recipe.seed)[0]
        check_thresholds(self.recipe.selection, labeled.class_names)
        check_batches(self.recipe, num_labeled=len(training.usable()), iterations=self.recipe.iterations.count)

    def _manifest(self, name: str) -> Path:
        return self.folders.output / "manifests" / f"{name}.parquet"

    def _has(self, name: str) -> bool:
        return getattr(self.folders, name) is not None

    def _read_folders(self) -> None:
        kinds: dict[str, Kind] = {"labeled": "labeled", "unlabeled": "unlabeled", "test": "evaluation", "validation": "evaluation"}
        for name, kind in kinds.items():
            path = self._manifest(name)
            # Until folders.json is there, a manifest may be one of other folders.
            if not self._has(name) or (path.exists() and (self.folders.output / "folders.json").exists()):
                continue
            manifest, report = scan(getattr(self.folders, name), kind=kind, on_event=self.on_event, should_stop=self.should_stop)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
            manifest.write(path)
        self._check_together()

    def _check_together(self) -> None:
        manifests = {
            name: Manifest.read(self._manifest(name)) for name in ("labeled", "unlabeled", "test", "validation") if self._has(name)
        }
        check_together(manifests)

    def _validation_manifest(self) -> Path:
        """The validation images: given, or cut from the labeled ones exactly as training cuts them."""
        if self._has("validation"):
            return self._manifest("validation")
        path = self._manifest("validation-cut")
        if not path.exists():
            _, validation = split_validation(Manifest.read(self._manifest("labeled")), self.recipe.validation_ratio, self.recipe.seed)
            validation.write(path)
        return path

    @property
    def runtime(self) -> RuntimeConfig:
        """Resolved once and kept with the results, so that a resumed run ends with the same bits."""
        if self._runtime is None:
            from ml.devices import resolve_runtime
            from ml.validation import from_json

            path = self.folders.output / "runtime.json"
            if path.exists():
                self._runtime = from_json(RuntimeConfig, path.read_text(encoding="utf-8"))
            else:
                self._runtime = resolve_runtime(self.recipe.runtime)
                write_bytes(path, f"{to_json(self._runtime)}\n".encode())
        return self._runtime

    def _train(self, role: str, iteration: int, plan: IterationPlan | None, teacher: GenerationRecord | None = None) -> GenerationRecord:
        """Train one generation unless it is there; append it to the lineage."""
        name = f"control-{iteration}" if role == "control" else f"generation-{iteration}"
        output = self.folders.output / name
        if not (output / "metrics.json").exists():
            from ml.training import train

            student = role == "student"
            network = plan.student.network if plan else self.recipe.teacher.network
            warm = teacher is not None and network.initial_weights == "teacher"
            task = TrainingTask(
                role=role,  # type: ignore[arg-type]
                iteration=iteration,
                recipe=self.recipe,
                runtime=self.runtime,
                student=plan.student if plan else None,
                labeled=str(self._manifest("labeled")),
                validation=str(self._manifest("validation")) if self._has("validation") else None,
                test=str(self._manifest("test")) if self._has("test") else None,
                unlabeled=str(self._manifest("unlabeled")) if student else None,
                selected=str(self._iteration_folder(iteration) / "selected.parquet") if student else None,
                initial_weights=str(self.folders.output / teacher.id) if warm and teacher else None,
                teacher=str(self.folders.output / teacher.id) if student and teacher else None,
                teacher_parameters=teacher.num_parameters if teacher else None,
                lineage={"teacher": teacher.id if teacher else None, "recipe": self.recipe.name, "seed": self.recipe.seed},
            )
            train(
                task,
                checkpoint_dir=self.folders.output / "work" / name,
                output_dir=output,
                on_event=self._named(name),
                should_stop=self.should_stop,
            )
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        self.lineage.append({"generation": name, "teacher": teacher.id if teacher else None, **metrics})
        self._write_lineage()
        return GenerationRecord(id=name, validation_top1=metrics["validation"]["top1"], num_parameters=metrics["num_parameters"])

    def _iteration_folder(self, iteration: int) -> Path:
        return self.folders.output / f"iteration-{iteration}"

    def _iterate(self, plan: IterationPlan, history: list[GenerationRecord]) -> GenerationRecord:
        """Label, select, train the student and, when asked, its control."""
        self._label(plan)
        self._select(plan)
        [teacher] = [record for record in history if record.id == plan.teacher]
        student = self._train("student", plan.iteration, plan, teacher)
        if plan.control:
            self._train("control", plan.iteration, plan, teacher)
        return student

    def _shards(self, plan: IterationPlan) -> list[tuple[Path, int, int]]:
        size = self.recipe.labeling.shard_size
        num_images = len(Manifest.read(self._manifest("unlabeled")))
        folder = self._iteration_folder(plan.iteration) / "shards"
        return [(folder / f"{start:09d}.parquet", start, min(start + size, num_images)) for start in range(0, num_images, size)]

    def _label(self, plan: IterationPlan) -> None:
        from ml.prediction import label

        for path, start, stop in self._shards(plan):
            path.parent.mkdir(parents=True, exist_ok=True)
            task = LabelingTask(
                generation=str(self.folders.output / plan.teacher),
                unlabeled=str(self._manifest("unlabeled")),
                start=start,
                stop=stop,
                labeling=self.recipe.labeling,
                runtime=self.runtime,
                output=str(path),
            )
            label(task, self._named(f"iteration-{plan.iteration}"), self.should_stop)

    def _select(self, plan: IterationPlan) -> None:
        from ml.selection import select

        output = self._iteration_folder(plan.iteration) / "selected.parquet"
        if output.exists():
            return
        evaluation = [self._validation_manifest(), *([self._manifest("test")] if self._has("test") else [])]
        again = self.recipe.selection.reselect or plan.iteration == 1
        task = SelectionTask(
            shards=tuple(str(path) for path, _, _ in self._shards(plan)),
            unlabeled=str(self._manifest("unlabeled")),
            evaluation=tuple(str(path) for path in evaluation),
            class_names=Manifest.read(self._manifest("labeled")).class_names,
            selection=self.recipe.selection,
            seed=self.recipe.seed,
            output=str(output),
            keep_keys_of=None if again else str(self._iteration_folder(1) / "selected.parquet"),
        )
        select(task, self._named(f"iteration-{plan.iteration}"), self.should_stop)

    def _named(self, name: str) -> OnEvent:
        """Add to each event of whom it speaks."""
        return lambda event: self.on_event(Event(kind=event.kind, data={"of": name, **event.data}))

    def _write_lineage(self) -> None:
        path = self.folders.output / "lineage.json"
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps({"recipe": to_dict(self.recipe), "generations": self.lineage}, indent=1), encoding="utf-8")
        os.replace(aside, path)


def check_together(manifests: Mapping[str, Manifest]) -> None:
    """ClassMismatch or Leakage when "test" or "validation" do not go with "labeled" and "unlabeled", or with each other."""
    classes = manifests["labeled"].class_names
    for name in ("test", "validation"):
        if name in manifests and manifests[name].class_names != classes:
            raise ClassMismatch(f"{name} has classes {manifests[name].class_names}, labeled has {classes}; they must be the same")
    evaluation = [manifests[name] for name in ("test", "validation") if name in manifests]
    found = find_leakage(evaluation, [manifests[name] for name in ("labeled", "unlabeled") if name in manifests])
    if found:
        keys = [str(row["key"]) for row in found[:100]]
        raise Leakage(f"{len(found)} evaluation images also sit in labeled or unlabeled data, for example {keys[0]}", keys=keys)
    found = find_leakage(evaluation[:1], evaluation[1:])
    if found:
        keys = [str(row["key"]) for row in found[:100]]
        raise Leakage(f"{len(found)} test images also sit in validation, for example {keys[0]}", keys=keys)


def lineage_table(lineage: list[dict[str, Any]], row: Callable[..., str] | None = None) -> list[str]:
    """One line per generation: name, network, steps, validation and test top-1 in percent with 95 % intervals."""
    line = row or "{:<16} {:<18} {:>8} {:>7} {:>24}".format
    lines = [line("generation", "network", "steps", "val %", "test % [95 % interval]")]
    for entry in lineage:
        validation = f"{100 * entry['validation']['top1']:.1f}"
        test = entry.get("test")
        reported = "-" if not test else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in (test["top1"], *test["interval"])))
        lines.append(line(entry["generation"], entry["architecture"], str(entry["steps"]), validation, reported))
    return lines
