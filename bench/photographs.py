"""Real pictures to measure with: 500 x 375 crops of scikit-learn's two photographs, all different, and 32-pixel ones like CIFAR's."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from bench.measurement import CACHE
from ml.ingestion import scan
from ml.manifest import Kind, Manifest

CLASSES = ("china", "flower")
WIDTH, HEIGHT = 500, 375
QUALITY = 90
SEED = 20200619


def photographs(num_images: int) -> Path:
    """A folder with one folder per class, `num_images` JPEG files in all; made once, then found in bench/cache."""
    return _folder(f"photographs-{num_images}", num_images, small=False)


def small_photographs(num_images: int) -> Path:
    """The same as 32-pixel JPEG files: squares of different places and sizes, scaled down."""
    return _folder(f"small-{num_images}", num_images, small=True)


def manifest_of(folder: Path, *, kind: Kind) -> Path:
    """The folder's manifest as a file beside it. An unlabeled one forgets the classes."""
    path = folder.with_name(f"{folder.name}-{kind}.parquet")
    if not path.exists():
        manifest, _ = scan(folder, kind="labeled")
        manifest.as_kind(kind).write(path)
    return path


def num_rows(path: Path) -> int:
    """Rows of a manifest."""
    return len(Manifest.read(path))


def _folder(name: str, num_images: int, *, small: bool) -> Path:
    folder = CACHE / name
    if folder.exists():
        return folder
    aside = CACHE / f"{name}.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    sources = _sources()
    generator = np.random.default_rng(SEED)
    for index, class_name in enumerate(CLASSES):
        of_class = aside / class_name
        of_class.mkdir(parents=True)
        source = sources[class_name]
        boxes = _small_boxes(source, generator) if small else _large_boxes(source, generator)
        for number in range(num_images // 2 + (num_images % 2) * (1 - index)):
            crop = source.crop(boxes[number])
            if small:
                crop = crop.resize((32, 32), Image.Resampling.BILINEAR)
            crop.save(of_class / f"{number:05d}.jpg", quality=QUALITY)
    aside.rename(folder)
    return folder


def _sources() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in CLASSES}


def _large_boxes(source: Image.Image, generator: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Every place of a 500 x 375 window, in a seeded order."""
    lefts, tops = source.width - WIDTH + 1, source.height - HEIGHT + 1
    places = generator.permutation(lefts * tops)
    return [(at % lefts, at // lefts, at % lefts + WIDTH, at // lefts + HEIGHT) for at in places.tolist()]


def _small_boxes(source: Image.Image, generator: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Squares of 64 to 256 pixels, all different."""
    boxes: dict[tuple[int, int, int, int], None] = {}
    while len(boxes) < 20_000:
        side = int(generator.integers(64, 257))
        left, top = int(generator.integers(source.width - side)), int(generator.integers(source.height - side))
        boxes[left, top, left + side, top + side] = None
    return list(boxes)
