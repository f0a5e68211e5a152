"""Training and labeling on an accelerator against the lowest of their ceilings: `python -m bench.accelerator --out FILE`.

The ceilings, measured in the same process and in turn with the whole: the network on one batch that lies on the device (in training
with loss, backward, clipping, optimizer and average), and the real loader with nobody behind it. No part of `make bench`, because
few machines have one; docs/experiments/accelerator.md holds what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.labeling import export
from bench.measurement import facts, interleaved, print_table, summary
from bench.photographs import manifest_of, num_rows, photographs, small_photographs
from bench.training import SEED, Setting, Stage
from ml import models
from ml.config import RuntimeConfig
from ml.devices import apply_runtime, autocast, host_facts, resolve_runtime
from ml.manifest import Manifest
from ml.pixels import Preprocessing
from ml.prediction import cast_once, host_batches, label, open_views
from ml.recipes import get_recipe
from ml.tasks import LabelingTask

REPEATS = 3
PHOTOGRAPHS = 2560
SMALL = 12_288
SECONDS = 2.5
"""Of each part of a turn, about."""


def main() -> None:
    """Measure, print, and write one JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.accelerator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the measurement itself")
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--small", type=int, default=SMALL)
    options = parser.parse_args()
    runtime = resolve_runtime(RuntimeConfig(device=options.device))
    apply_runtime(runtime)
    pools = {"photos-224": photographs(options.photographs), "small-32px": small_photographs(options.small)}
    tables: dict[str, list[dict[str, float | str]]] = {}
    for title, measured, settings in (
        ("Training, images/s", _measure_training, (("photos-224", 32), ("photos-224", 256), ("small-32px", 256))),
        ("Labeling, images/s", _measure_labeling, (("photos-224", 64), ("photos-224", 256), ("small-32px", 256))),
    ):
        tables[title] = []
        for preset, batch in settings:
            tables[title].append(measured(preset, pools[preset], runtime, batch))
            print_table(title, tables[title][-1:])
            found = {
                "tables": tables,
                "host": host_facts(runtime),
                "runtime": str(runtime),
                "facts": facts(),
                "repeats": REPEATS,
                "seed": SEED,
            }
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rate(work: Callable[[], Any], images: int, *, warm_ups: int = 1) -> float:
    """Images a second of `work()`, which handles `images` of them, called until `SECONDS` are over and the device is done."""
    for _ in range(warm_ups):
        work()
    _wait_for_device()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        work()
        calls += 1
        if calls % 10 == 0:
            # The host must not run ahead by more than it would in a training.
            _wait_for_device()
    _wait_for_device()
    return calls * images / (time.perf_counter() - started)


def _row(preset: str, batch: int, turns: dict[str, list[float]]) -> dict[str, float | str]:
    ratios = [
        whole / min(network, loader) for whole, network, loader in zip(turns["whole"], turns["network"], turns["loader"], strict=True)
    ]
    return {
        "preset": preset,
        "batch": batch,
        **{name: summary(turns[name])["median"] for name in ("network", "loader", "whole")},
        **{name: summary(ratios)[key] for name, key in (("ratio", "median"), ("lowest", "lowest"), ("highest", "highest"))},
    }


def _measure_training(preset: str, pool: Path, runtime: RuntimeConfig, batch: int) -> dict[str, float | str]:
    setting = Setting(preset=preset, pool=pool, repeats=REPEATS, steps=0, warm_steps=0, seconds=SECONDS)
    stage = Stage(setting, runtime, batch=batch)
    # What the loader had ready while others were measured must not count.
    stored = 4 * int(runtime.num_loader_workers)
    with stage.batches as batches:
        numbered = iter(enumerate(batches))
        parts = {
            "network": lambda: _rate(stage.alone.step, batch, warm_ups=3),
            "loader": lambda: _rate(lambda: next(numbered), batch, warm_ups=stored),
            "whole": lambda: _rate(lambda: stage.learner.step(*next(numbered)), batch, warm_ups=stored),
        }
        parts["whole"]()
        turns = interleaved(parts, repeats=REPEATS)
    return _row(preset, batch, turns)


def _measure_labeling(preset: str, pool: Path, runtime: RuntimeConfig, batch: int) -> dict[str, float | str]:
    recipe = get_recipe(preset)
    folder = Path(tempfile.mkdtemp(prefix="bench-accelerator-"))
    try:
        generation = export(preset, folder / "generation")
        manifest = manifest_of(pool, kind="unlabeled")
        images = num_rows(manifest)
        task = LabelingTask(
            generation=str(generation),
            unlabeled=str(manifest),
            start=0,
            stop=images,
            labeling=recipe.labeling.__class__(batch_size=batch),
            runtime=runtime,
            output=str(folder / "shard.parquet"),
        )
        rows, preprocessing = Manifest.read(manifest), Preprocessing.from_config(recipe.image)
        network = models.load_generation(generation, torch.device(runtime.device)).network
        network = cast_once(network) if runtime.precision == "bf16" else network
        generator = torch.Generator().manual_seed(SEED)
        resident = torch.randn(batch, 3, recipe.image.size, recipe.image.size, generator=generator)
        resident = resident.to(device=runtime.device, memory_format=torch.channels_last)

        def forward() -> None:
            with torch.inference_mode(), autocast(runtime):
                network(resident)

        def loader() -> float:
            views = open_views(rows, preprocessing, runtime, largest_batch=batch)
            started = time.perf_counter()
            for _ in host_batches(views, runtime):
                pass
            return images / (time.perf_counter() - started)

        def whole() -> float:
            Path(task.output).unlink(missing_ok=True)
            return float(label(task)["images_per_second"])

        whole()
        turns = interleaved({"network": lambda: _rate(forward, batch), "loader": loader, "whole": whole}, repeats=REPEATS)
    finally:
        shutil.rmtree(folder)
    return _row(preset, batch, turns)


if __name__ == "__main__":
    main()
