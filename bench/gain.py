"""What Noisy Student gains: teacher, control, student without noise and noisy students, seed by seed, on test.

    python -m bench.gain digits --seeds 0 1 2 3 4 --out DIR
    python -m bench.gain folders --labeled DIR/train --split 200 --test DIR/test --recipe small-32px --seeds 0 1 2 --out DIR

Each seed is one `ml.loop` run plus one with the student's noise off that shares its teacher. Every arm puts equally many images through
forward and backward; validation chooses, test only reports. What is done is left alone, so a killed experiment goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml.events import Event
from ml.ingestion import scan, split_folder
from ml.loop import Folders, LocalRun
from ml.manifest import Manifest
from ml.recipes import build_recipe

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093}
NO_NOISE = {"randaugment_operations": 0, "extra_cutout_pixels": 0, "crop_and_flip": False, "dropout": 0.0, "stochastic_depth": 0.0}


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t-interval of the mean; infinite for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    # Between the listed ones the next smaller degree of freedom gives the wider, so the safer, interval.
    quantile = T_QUANTILES[max(degree for degree in T_QUANTILES if degree < len(values))]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def run_seed(
    folders: Mapping[str, Path], out: Path, *, recipe: str, seed: int, overrides: Mapping[str, Any], quiet_too: bool = True
) -> dict[str, Any]:
    """All arms of one seed: arm → {test, validation, seconds}, in shares of 1."""
    base = {**overrides, "seed": seed}
    arms: dict[str, dict[str, Any]] = {}
    for entry in _loop(folders, out / f"seed-{seed}" / "noisy", build_recipe(recipe, base)):
        arms[_arm_name(entry)] = _figures(entry)
    if not quiet_too:
        return arms
    quiet = {**base, "students": [{"noise": NO_NOISE}], "iterations": {"count": 1, "control": False}}
    _share_teacher(out / f"seed-{seed}" / "noisy", out / f"seed-{seed}" / "quiet")
    quiet_entry = _loop(folders, out / f"seed-{seed}" / "quiet", build_recipe(recipe, quiet))[-1]
    arms["student 1 without noise"] = _figures(quiet_entry)
    return arms


def _arm_name(entry: Mapping[str, Any]) -> str:
    words = {"teacher": "teacher", "student": f"noisy student {entry['iteration']}", "control": f"control {entry['iteration']}"}
    return words[entry["role"]]


def _figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"test": entry["test"]["top1"], "validation": entry["validation"]["top1"], "seconds": entry["training_seconds"]}


def _loop(folders: Mapping[str, Path], out: Path, recipe: Any) -> list[dict[str, Any]]:
    def say(event: Event) -> None:
        if event.kind in ("stage", "warning"):
            print(out.parent.name, out.name, event.data, file=sys.stderr, flush=True)

    return LocalRun(Folders(**folders, output=out), recipe, on_event=say).run()


def _share_teacher(source: Path, target: Path) -> None:
    """The student without noise learns from the very same teacher."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("generation-0", "manifests", "runtime.json"):
        if not (target / name).exists():
            os.symlink((source / name).resolve(), target / name)


def split_into_folders(source: Path, out: Path, *, per_class: int, seed: int) -> dict[str, Path]:
    """Cut a class folder into `labeled/<class>/` and a flat `unlabeled/`, as links; the service's split does the same to manifests."""
    folders = {"labeled": out / f"split-{seed}" / "labeled", "unlabeled": out / f"split-{seed}" / "unlabeled"}
    if all(folder.exists() for folder in folders.values()):
        return folders
    manifest, _ = scan(source, kind="labeled")
    parts = split_folder(manifest, {"labeled": per_class, "unlabeled": "rest"}, seed)
    for part, folder in folders.items():
        _link(parts[part], folder)
    return folders


def _link(manifest: Manifest, folder: Path) -> None:
    for (path, *_), key in zip(manifest.locations(), manifest.column("key"), strict=True):
        target = folder / (key if folder.name == "labeled" else key.replace("/", "-"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(path, target)


def report(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """The tables of an experiment as Markdown: per arm and seed, then paired differences to the noisy students."""
    seeds = sorted(results)
    arms = list(results[seeds[0]])
    lines = ["| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | 95 % interval | seconds a training |"]
    lines.append("| --- |" + " ---: |" * (len(seeds) + 3))
    for arm in arms:
        values = [100 * results[seed][arm]["test"] for seed in seeds]
        low, high = t_interval(values)
        seconds = statistics.fmean(results[seed][arm]["seconds"] for seed in seeds)
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {arm} | {cells} | {statistics.fmean(values):.2f} | {low:.2f} … {high:.2f} | {seconds:.0f} |")
    lines += ["", "| paired difference on test, points | mean | 95 % interval |", "| --- | ---: | ---: |"]
    students = [arm for arm in arms if arm.startswith("noisy student")]
    others = [arm for arm in arms if arm not in students]
    # A student is held against the control of its own iteration.
    pairs = [
        (student, other)
        for student in students
        for other in others
        if not other.startswith("control") or other.split()[-1] == student.split()[-1]
    ]
    pairs += [(other, "teacher") for other in others if other.endswith("without noise")]
    for one, other in pairs:
        differences = [100 * (results[seed][one]["test"] - results[seed][other]["test"]) for seed in seeds]
        low, high = t_interval(differences)
        lines.append(f"| {one} − {other} | {statistics.fmean(differences):+.2f} | {low:+.2f} … {high:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the seeds that are asked for, then print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.gain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "folders"))
    parser.add_argument("--labeled", type=Path)
    parser.add_argument("--unlabeled", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--split", type=int, help="labeled images per class; the rest of --labeled is the pool")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--override", default="{}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--without-quiet", action="store_true", help="leave the student without noise out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = {}
    for seed in options.seeds:
        results[seed] = run_seed(
            _folders(options, seed),
            options.out,
            recipe=options.recipe,
            seed=seed,
            overrides=json.loads(options.override),
            quiet_too=not options.without_quiet,
        )
        (options.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(report(results), flush=True)


def _folders(options: argparse.Namespace, seed: int) -> dict[str, Path]:
    if options.data == "digits":
        from cli.digits import write_digits

        digits = write_digits(options.out / f"digits-{seed}", seed=seed)
        return {"labeled": digits.labeled, "unlabeled": digits.unlabeled, "test": digits.test}
    if options.split is None:
        return {"labeled": options.labeled, "unlabeled": options.unlabeled, "test": options.test}
    return {**split_into_folders(options.labeled, options.out, per_class=options.split, seed=seed), "test": options.test}


if __name__ == "__main__":
    main()
