"""The strong view: what a student sees of an image. The weak view lives in `ml.pixels`.

Large images: random-resized-crop, flip, RandAugment. Small images: reflected border and random crop, flip, RandAugment.
Then the extra cutout. Everything random comes from the generator that is passed. No torch: a loader process starts fast.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from ml.config import ImageConfig, NoiseConfig
from ml.pixels import INTERPOLATIONS, Preprocessing, weak_image
from ml.randaugment import FILL, randaugment, reach

Pixels = npt.NDArray[np.uint8]

WITHOUT_NOISE = NoiseConfig(randaugment_operations=0, crop_and_flip=False)
_ATTEMPTS = 10
_RATIOS = (math.log(3 / 4), math.log(4 / 3))


def strong_view(image: Image.Image, config: ImageConfig, noise: NoiseConfig, generator: np.random.Generator) -> Pixels:
    """The uint8 HWC square of side `config.size` that a student sees of an RGB image."""
    if config.small_images:
        return strong_view_of_small(np.asarray(weak_image(image, training_preprocessing(config))), config, noise, generator)
    if not noise.crop_and_flip:
        return _add_noise(weak_image(image, training_preprocessing(config)), config, noise, generator)
    flip, *attempts = generator.random(1 + 4 * _ATTEMPTS).tolist()
    box = random_resized_box(image.width, image.height, config.min_crop_area, attempts)
    view = image.resize((config.size, config.size), INTERPOLATIONS[config.interpolation], box=box)
    if config.flip and flip < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _add_noise(view, config, noise, generator)


def strong_view_of_small(pixels_HWC: Pixels, config: ImageConfig, noise: NoiseConfig, generator: np.random.Generator) -> Pixels:
    """`strong_view` of a small image that is a square of side `config.size` already."""
    if noise.crop_and_flip:
        flip, x, y = generator.random(3).tolist()
        places = _reflected(config.size, config.padding)
        shifts = 2 * config.padding + 1
        rows = places[int(y * shifts) :][: config.size]
        columns = places[int(x * shifts) :][: config.size]
        if config.flip and flip < 0.5:
            columns = columns[::-1]
        pixels_HWC = pixels_HWC.take(rows, 0).take(columns, 1)
    return _add_noise(pixels_HWC, config, noise, generator)


@lru_cache(maxsize=8)
def training_preprocessing(config: ImageConfig) -> Preprocessing:
    """The weak view at the training size."""
    return Preprocessing.from_config(config, size=config.size)


def random_resized_box(width: int, height: int, min_area: float, draws: list[float]) -> tuple[int, int, int, int]:
    """A box of random area and shape (3:4 to 4:3) inside the image: left, top, right, bottom.

    `draws` holds four numbers in [0, 1) per attempt: area, shape, left, top. When no attempt fits, the largest box of
    an allowed shape at the center.
    """
    for at in range(0, len(draws), 4):
        area, shape, x, y = draws[at : at + 4]
        target = width * height * (min_area + (1 - min_area) * area)
        ratio = math.exp(_RATIOS[0] + (_RATIOS[1] - _RATIOS[0]) * shape)
        box_width, box_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(x * (width - box_width + 1)), int(y * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * 4 / 3)))
    box_height = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


@lru_cache(maxsize=8)
def _reflected(size: int, padding: int) -> npt.NDArray[np.intp]:
    return np.pad(np.arange(size), padding, mode="reflect")


def _add_noise(view: Image.Image | Pixels, config: ImageConfig, noise: NoiseConfig, generator: np.random.Generator) -> Pixels:
    if noise.randaugment_operations:
        image = Image.fromarray(view) if isinstance(view, np.ndarray) else view
        translate = noise.translate_pixels
        cutout = noise.cutout_pixels
        view = randaugment(
            image,
            operations=noise.randaugment_operations,
            magnitude=noise.randaugment_magnitude,
            translate_pixels=reach(config.size, at_224=100) if translate is None else translate,
            cutout_pixels=reach(config.size, at_224=40) if cutout is None else cutout,
            generator=generator,
        )
    pixels_HWC = np.array(view)
    if noise.extra_cutout_pixels:
        _cut_out(pixels_HWC, noise.extra_cutout_pixels, generator)
    return pixels_HWC


def _cut_out(pixels_HWC: Pixels, side: int, generator: np.random.Generator) -> None:
    height, width, _ = pixels_HWC.shape
    x, y = generator.random(2).tolist()
    left, top = int(x * width) - side // 2, int(y * height) - side // 2
    pixels_HWC[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = FILL
