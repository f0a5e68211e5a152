"""Labeling end to end against the CPU ceiling cores / (t_decode + t_model), each alone on one core in the same process.

End to end is `ml.prediction.label` as a job calls it: the generation opened, files read, decoded and resized, the network, the
label shard written and flushed. The network has random weights, which costs the same as trained ones.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

from bench.measurement import Measurement, interleaved, seconds_per_call, summary
from bench.photographs import CLASSES, manifest_of, num_rows, photographs, small_photographs
from ml import models
from ml.config import RuntimeConfig
from ml.cores import num_cores
from ml.devices import apply_runtime, autocast, resolve_runtime
from ml.manifest import Manifest
from ml.pixels import Preprocessing, read_image, weak_view
from ml.prediction import batch_for, cast_once, label
from ml.recipes import get_recipe
from ml.tasks import LabelingTask

SEED = 1
REPEATS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setting:
    preset: str
    pool: Path
    shard: int
    """Images of one call of `label`, out of the pool."""
    seconds: float
    """Of measuring each term of the ceiling, per repeat."""


def measure() -> Measurement:
    found = Measurement(name="labeling", details={"seed": SEED, "repeats": REPEATS})
    settings = (
        _Setting(preset="small-32px", pool=small_photographs(8192), shard=8192, seconds=0.5),
        _Setting(preset="photos-224", pool=photographs(400), shard=400, seconds=1.0),
    )
    rows = []
    for setting in settings:
        folder = Path(tempfile.mkdtemp(prefix="bench-labeling-"))
        try:
            rows.append(_measure(setting, folder, found))
        finally:
            shutil.rmtree(folder)
    found.tables["Labeling, images/s (medians of interleaved repeats)"] = rows
    return found


def _measure(setting: _Setting, folder: Path, found: Measurement) -> dict[str, float | str]:
    recipe = get_recipe(setting.preset)
    runtime = resolve_runtime(RuntimeConfig(device="cpu"))
    device = apply_runtime(runtime)
    generation = export(setting.preset, folder / "generation")
    network = models.load_generation(generation, device).network
    pool = manifest_of(setting.pool, kind="unlabeled")
    task = LabelingTask(
        generation=str(generation),
        unlabeled=str(pool),
        start=0,
        stop=setting.shard,
        labeling=recipe.labeling,
        runtime=runtime,
        output=str(folder / "shard.parquet"),
    )

    def end_to_end() -> float:
        Path(task.output).unlink(missing_ok=True)
        apply_runtime(runtime)
        summed = label(task)
        assert summed["statuses"] == {"ok": num_rows(pool)}, summed["statuses"]
        return float(summed["images_per_second"])

    preprocessing = Preprocessing.from_config(recipe.image)
    batch = batch_for("cpu", preprocessing.size, recipe.labeling.batch_size)
    paths = cycle(Manifest.read(pool).locations())

    def decode() -> float:
        return seconds_per_call(lambda: weak_view(read_image(next(paths)), preprocessing), at_least=setting.seconds)

    def model() -> float:
        return _seconds_of_network(cast_once(network), runtime, batch=batch, side=preprocessing.size, at_least=setting.seconds)

    for warm_up in (decode, model, end_to_end):
        warm_up()
    turns = interleaved({"decode": decode, "model": model, "rate": end_to_end}, repeats=REPEATS, most=REPEATS + 3)
    ceilings = [num_cores() / (one + other) for one, other in zip(turns["decode"], turns["model"], strict=True)]
    ratios = [rate / ceiling for rate, ceiling in zip(turns["rate"], ceilings, strict=True)]
    found.figures[f"labeling-{setting.preset}"] = summary(ratios)["median"]
    found.details[setting.preset] = {"turns": turns, "runtime": str(runtime), "batch": batch, "images": setting.shard}
    return {
        "preset": setting.preset,
        "decode+resize a core": 1 / summary(turns["decode"])["median"],
        "network a core": 1 / summary(turns["model"])["median"],
        "ceiling": summary(ceilings)["median"],
        "end to end": summary(turns["rate"])["median"],
        "ratio": summary(ratios)["median"],
        "lowest": summary(ratios)["lowest"],
        "highest": summary(ratios)["highest"],
        "others' CPU": summary(turns["others"])["median"],
    }


def _seconds_of_network(network: torch.nn.Module, runtime: RuntimeConfig, *, batch: int, side: int, at_least: float) -> float:
    """Seconds an image on one core: the network alone, on one batch that lies there normalized, in the runtime's precision."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, side, side, generator=generator).to(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast(runtime):
        seconds = seconds_per_call(lambda: network(images), at_least=at_least)
    torch.set_num_threads(threads)
    return seconds / batch


def export(preset: str, folder: Path) -> Path:
    """A generation with random weights, without its ONNX file, which labeling does not read."""
    recipe = get_recipe(preset)
    torch.manual_seed(SEED)
    network = models.create_network(recipe.teacher.network, num_classes=len(CLASSES), noise=recipe.teacher.noise, image=recipe.image)
    folder.mkdir(parents=True)
    preprocessing = Preprocessing.from_config(recipe.image)
    models.save_network(network.eval(), folder, class_names=CLASSES, preprocessing=preprocessing)
    for name, data in {"preprocessing": preprocessing.to_dict(), "class_names": list(CLASSES), "calibration": {"temperature": 1.0}}.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder
