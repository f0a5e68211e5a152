"""`python -m ml`: the method without the service. `python -m ml run --help` tells the rest.

Images come from folders, tar shards, Parquet files or lists (`ml.sources`), on this machine or in S3 (`s3://BUCKET/PREFIX`).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ml.config import LabelingConfig, Recipe, RuntimeConfig, SelectionConfig
from ml.errors import Interrupted, MlError, RecipeError
from ml.events import Event
from ml.objects import is_address
from ml.recipes import PRESETS, build_recipe
from ml.validation import from_json, load_json


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0 when it is done, 1 when it was refused, 130 when it was stopped (the same command goes on)."""
    options = _parser().parse_args(arguments)
    stopped = False

    def stop(_signal: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    reporter = _Reporter(json_lines=options.json)
    try:
        options.verb(options, reporter, lambda: stopped)
    except Interrupted as interrupted:
        print(f"stopped: {interrupted}; the same command goes on from here", file=sys.stderr)
        return 130
    except (MlError, OSError) as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    return 0


class _Reporter:
    """Prints events: one line that rewrites itself on a terminal, JSON lines for programs."""

    def __init__(self, *, json_lines: bool) -> None:
        self.json_lines = json_lines
        self._printed = 0.0
        self._dirty = False

    def __call__(self, event: Event) -> None:
        if self.json_lines:
            print(json.dumps({"kind": event.kind, **event.data}), flush=True)
            return
        of = event.data.get("of", "")
        if event.kind == "stage":
            self._line(f"{of:<14} {event.data['stage']} {event.data.get('reason', '')}".rstrip(), keep=True)
        elif event.kind == "warning":
            self._line(f"{of:<14} warning: {event.data['message']}", keep=True)
        elif event.kind == "progress":
            rate = event.data.get("images_per_second") or 0
            self._line(f"{of:<14} {event.data['done']}/{event.data['total']} {event.data['unit']}, {rate:.0f} images/s", keep=False)
        elif event.kind == "metric" and "validation_top1" in event.data:
            top1 = 100 * event.data["validation_top1"]
            self._line(f"{of:<14} step {event.data['step']}: validation {top1:.1f} %", keep=True)

    def _line(self, text: str, *, keep: bool) -> None:
        if not keep and (not sys.stderr.isatty() or time.monotonic() - self._printed < 0.1):
            return
        self._printed = time.monotonic()
        if self._dirty:
            print("\r\033[K", end="", file=sys.stderr)
        print(text, end="\n" if keep else "", file=sys.stderr, flush=True)
        self._dirty = not keep


def _place(text: str) -> Path | str:
    """Of images; an address must not become a path, which has no two slashes."""
    return text if is_address(text) else Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ml", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print events and results as JSON lines")
    verbs = parser.add_subparsers(required=True)

    run = verbs.add_parser("run", help="the whole loop: images in, generations out; the same command goes on after a kill")
    for name, needed in (("labeled", True), ("unlabeled", True), ("test", False), ("validation", False)):
        run.add_argument(f"--{name}", type=_place, required=needed)
    run.add_argument("--out", type=Path, required=True)
    _recipe_options(run)
    run.set_defaults(verb=_run)

    train = verbs.add_parser("train", help="one teacher on labeled images alone")
    train.add_argument("--labeled", type=_place, required=True)
    train.add_argument("--test", type=_place)
    train.add_argument("--validation", type=_place)
    train.add_argument("--out", type=Path, required=True)
    _recipe_options(train)
    train.set_defaults(verb=_train)

    label = verbs.add_parser("label", help="an exported generation's guesses for unlabeled images, without noise")
    label.add_argument("generation", type=Path)
    label.add_argument("--unlabeled", type=_place, required=True)
    label.add_argument("--out", type=Path, required=True, help="folder of label shards")
    label.add_argument("--labeling", default="{}", help="LabelingConfig as JSON")
    label.add_argument("--runtime", default="{}", help="RuntimeConfig as JSON")
    label.set_defaults(verb=_label)

    select = verbs.add_parser("select", help="choose and balance the guesses of a folder that `label` wrote")
    select.add_argument("labels", type=Path, help="folder of label shards")
    select.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    select.add_argument("--selection", default="{}", help="SelectionConfig as JSON")
    select.add_argument("--seed", type=int, default=0)
    select.add_argument("--evaluation", type=_place, action="append", default=[], help="labeled images that must not be selected")
    select.set_defaults(verb=_select)

    evaluate = verbs.add_parser("evaluate", help="measure an exported generation on labeled images")
    evaluate.add_argument("generation", type=Path)
    evaluate.add_argument("--images", type=_place, required=True)
    evaluate.add_argument("--predictions", type=Path, help="Parquet file to write")
    evaluate.add_argument("--runtime", default="{}", help="RuntimeConfig as JSON")
    evaluate.set_defaults(verb=_evaluate)

    export = verbs.add_parser(
        "export", help="a timm folder (config.json + model.safetensors) as a generation: ONNX, preprocessing, model card"
    )
    export.add_argument("source", type=Path)
    export.add_argument("--classes", type=Path, required=True, help="JSON list of class names, in the order of the outputs")
    export.add_argument("--out", type=Path, required=True)
    export.set_defaults(verb=_export)
    return parser


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", choices=sorted(PRESETS), default="small-32px", help="preset to start from")
    parser.add_argument("--override", default="{}", help='partial recipe as JSON, for example \'{"seed": 3, "students": [{"ratio": 1}]}\'')
    parser.add_argument("--seed", type=int, help="short for --override '{\"seed\": N}'")


def _recipe(options: argparse.Namespace) -> Recipe:
    try:
        overrides = load_json(options.override)
    except RecipeError as error:
        raise RecipeError(f"--override {options.override!r} is {error}; write it as '{{\"seed\": 3}}'", pointer=error.pointer) from error
    return build_recipe(options.recipe, overrides if options.seed is None else {**overrides, "seed": options.seed})


def _run(options: argparse.Namespace, reporter: _Reporter, should_stop: Any) -> None:
    from ml.loop import Folders, LocalRun, lineage_table

    folders = Folders(
        labeled=options.labeled, unlabeled=options.unlabeled, test=options.test, validation=options.validation, output=options.out
    )
    lineage = LocalRun(folders, _recipe(options), on_event=reporter, should_stop=should_stop).run()
    print(json.dumps(lineage) if options.json else "\n".join(lineage_table(lineage)))


def _train(options: argparse.Namespace, reporter: _Reporter, should_stop: Any) -> None:
    from ml.devices import resolve_runtime
    from ml.ingestion import scan
    from ml.loop import check_together
    from ml.tasks import TrainingTask
    from ml.training import train

    recipe = _recipe(options)
    manifests = {
        name: scan(folder, kind="labeled" if name == "labeled" else "evaluation", on_event=reporter, should_stop=should_stop)[0]
        for name in ("labeled", "test", "validation")
        if (folder := getattr(options, name)) is not None
    }
    check_together(manifests)
    paths = {name: options.out / "manifests" / f"{name}.parquet" for name in manifests}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        manifests[name].write(path)
    task = TrainingTask(
        role="teacher",
        iteration=0,
        recipe=recipe,
        runtime=resolve_runtime(recipe.runtime),
        labeled=str(paths["labeled"]),
        validation=str(paths["validation"]) if "validation" in paths else None,
        test=str(paths["test"]) if "test" in paths else None,
    )
    metrics = train(
        task, checkpoint_dir=options.out / "work", output_dir=options.out / "generation", on_event=reporter, should_stop=should_stop
    )
    _print(metrics, options)


def _label(options: argparse.Namespace, reporter: _Reporter, should_stop: Any) -> None:
    from ml.devices import resolve_runtime
    from ml.ingestion import scan
    from ml.prediction import label
    from ml.tasks import LabelingTask

    labeling = from_json(LabelingConfig, options.labeling)
    options.out.mkdir(parents=True, exist_ok=True)
    manifest, _ = scan(options.unlabeled, kind="unlabeled", on_event=reporter, should_stop=should_stop)
    manifest.write(options.out / "pool.manifest")
    runtime = resolve_runtime(from_json(RuntimeConfig, options.runtime))
    for start in range(0, len(manifest), labeling.shard_size):
        stop = min(start + labeling.shard_size, len(manifest))
        task = LabelingTask(
            generation=str(options.generation),
            unlabeled=str(options.out / "pool.manifest"),
            start=start,
            stop=stop,
            labeling=labeling,
            runtime=runtime,
            output=str(options.out / f"{start:09d}.parquet"),
        )
        _print(label(task, reporter, should_stop), options)


def _select(options: argparse.Namespace, reporter: _Reporter, should_stop: Any) -> None:
    from ml.ingestion import scan
    from ml.pseudo_labels import read_facts
    from ml.selection import select
    from ml.tasks import SelectionTask

    shards = sorted(options.labels.glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{options.labels} holds no label shard; `python -m ml label` writes them")
    evaluation = []
    for number, folder in enumerate(options.evaluation):
        manifest, _ = scan(folder, kind="evaluation", on_event=reporter, should_stop=should_stop)
        manifest.write(options.labels / f"evaluation-{number}.manifest")
        evaluation.append(str(options.labels / f"evaluation-{number}.manifest"))
    task = SelectionTask(
        shards=tuple(str(path) for path in shards),
        unlabeled=str(options.labels / "pool.manifest"),
        evaluation=tuple(evaluation),
        class_names=tuple(read_facts(shards[0])["class_names"]),
        selection=from_json(SelectionConfig, options.selection),
        seed=options.seed,
        output=str(options.out),
    )
    _print(select(task, reporter, should_stop), options)


def _evaluate(options: argparse.Namespace, reporter: _Reporter, should_stop: Any) -> None:
    from ml.devices import resolve_runtime
    from ml.ingestion import scan
    from ml.prediction import evaluate
    from ml.tasks import EvaluationTask

    manifest, _ = scan(options.images, kind="evaluation", on_event=reporter, should_stop=should_stop)
    path = options.generation.parent / f".{str(options.images).rpartition('/')[2]}.manifest"
    manifest.write(path)
    runtime = resolve_runtime(from_json(RuntimeConfig, options.runtime))
    task = EvaluationTask(generation=str(options.generation), manifest=str(path), runtime=runtime)
    try:
        _print(evaluate(task, reporter, should_stop, predictions=options.predictions), options)
    finally:
        path.unlink()


def _export(options: argparse.Namespace, _reporter: _Reporter, _should_stop: Any) -> None:
    from ml.export import import_generation

    class_names = load_json(options.classes.read_text(encoding="utf-8"))
    _print(import_generation(options.source, options.out, class_names=class_names), options)


def _print(result: Any, options: argparse.Namespace) -> None:
    print(json.dumps(result, indent=None if options.json else 1, default=vars))


if __name__ == "__main__":
    sys.exit(main())
