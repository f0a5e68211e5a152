"""Images a second of one core through the 15 corruptions, all severities, 32-pixel photographs in batches.

Timed in CPU seconds of this process, so that neither other processes nor a second thread of BLAS makes a core look faster or
slower than it is. The mean over the corruptions is of seconds, not of rates: what a whole evaluation takes.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bench.measurement import Measurement, interleaved, summary, typical_seconds
from bench.photographs import small_photographs
from ml.robustness.corruptions import corrupt
from ml.robustness.severities import CORRUPTIONS, EXTRA, SEVERITIES

SEED = 1
REPEATS = 5
NUM_IMAGES = 512


def measure() -> Measurement:
    torch.set_num_threads(1)
    images = _images(NUM_IMAGES)
    # The first call makes textures, kernels and maps of pixels; they are kept.
    for corruption in (*CORRUPTIONS, *EXTRA):
        _seconds(images[:1], corruption)
    parts = {name: partial(_seconds, images, name) for name in (*CORRUPTIONS, *EXTRA)}
    turns = interleaved(parts, repeats=REPEATS, most=2 * REPEATS)
    seconds = {name: typical_seconds(turns, name) for name in (*CORRUPTIONS, *EXTRA)}
    found = Measurement(name="corruptions", details={"seed": SEED, "repeats": REPEATS, "images": NUM_IMAGES, "turns": turns})
    mean = statistics.mean(seconds[name] for name in CORRUPTIONS)
    found.figures["corruptions-small"] = 1 / mean
    rows = [{"corruption": name, "µs an image": 1e6 * taken, "images/s of one core": 1 / taken} for name, taken in seconds.items()]
    rows.append({"corruption": "mean of the 15", "µs an image": 1e6 * mean, "images/s of one core": 1 / mean})
    found.tables["Corruptions at 32 pixels, five severities"] = rows
    found.details["others"] = summary(turns["others"])
    return found


def _seconds(images: npt.NDArray[np.uint8], corruption: str) -> float:
    """CPU seconds an image, mean over the severities."""
    started = time.process_time()
    for severity in SEVERITIES:
        corrupt(images, corruption, severity, seed=SEED, indices=range(len(images)))
    return (time.process_time() - started) / (len(SEVERITIES) * len(images))


def _images(count: int) -> npt.NDArray[np.uint8]:
    paths = sorted(small_photographs(8192).rglob("*.jpg"))
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in chosen])
