"""RandAugment as the paper's code has it: 16 operations, drawn uniformly with replacement, always applied.

Written by hand because timm's clips the magnitude at 10, applies each operation with p = 0.5, lacks Cutout and crashes on
Pillow 13, and torchvision's magnitude is another scale. Departures from the official code, all outside what it can do:
posterize keeps 1 to 8 bits and solarize a threshold up to 256 (both grow *weaker* with the magnitude and would leave the
byte), and Contrast turns around the image's mean gray (the official code divides the number of pixels by 256 instead).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

FILL = 128
"""Gray that shows where an operation leaves nothing."""

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)

_GRAY = (FILL, FILL, FILL)
_NEAREST = Image.Resampling.NEAREST
_AFFINE = Image.Transform.AFFINE
_SIGNED = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})
_RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def reach(size: int, *, at_224: float) -> float:
    """Pixels that translation or Cutout reaches at magnitude 10, for images of `size`.

    The paper's constant at 224 px and above, size // 8 below 64 (its 32-pixel path), linear in between.
    """
    if size < 64:
        return float(size // 8)
    return 8 + (at_224 - 8) * min(1.0, (size - 64) / 160)


@lru_cache(maxsize=64)
def operation_arguments(magnitude: float, *, translate_pixels: float, cutout_pixels: float) -> dict[str, float]:
    """What each operation gets at this magnitude; with c = magnitude / 10.

    Rotate in degrees, Shear as a tangent, Translate and Cutout (half side) in pixels, enhancements as a blend factor,
    Posterize in bits kept, Solarize as a threshold, SolarizeAdd as an addend. Others get 0, which they ignore.
    """
    c = magnitude / 10
    blend = 1.8 * c + 0.1
    return dict.fromkeys(OPERATIONS, 0.0) | {
        "Rotate": 30 * c,
        "Posterize": min(8, max(1, int(4 * c))),
        "Solarize": min(256, int(256 * c)),
        "Color": blend,
        "Contrast": blend,
        "Brightness": blend,
        "Sharpness": blend,
        "ShearX": 0.3 * c,
        "ShearY": 0.3 * c,
        "TranslateX": translate_pixels * c,
        "TranslateY": translate_pixels * c,
        "Cutout": int(cutout_pixels * c),
        "SolarizeAdd": int(110 * c),
    }


def randaugment(
    image: Image.Image,
    *,
    operations: int,
    magnitude: float,
    translate_pixels: float,
    cutout_pixels: float,
    generator: np.random.Generator,
) -> Image.Image:
    """An RGB image after `operations` random operations; any magnitude from 0 to 40."""
    arguments = operation_arguments(magnitude, translate_pixels=translate_pixels, cutout_pixels=cutout_pixels)
    for which, sign, x, y in generator.random((operations, 4)).tolist():
        name = OPERATIONS[int(which * len(OPERATIONS))]
        argument = arguments[name]
        if name in _SIGNED and sign < 0.5:
            argument = -argument
        image = apply(image, name, argument, x=x, y=y)
    return image


def apply(image: Image.Image, name: str, argument: float, *, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """One operation. `x` and `y` in [0, 1) place the center of Cutout."""
    if name == "Cutout":
        return cutout(image, int(argument), x, y)
    return _FUNCTIONS[name](image, argument)


def cutout(image: Image.Image, half_side: int, x: float, y: float) -> Image.Image:
    """A gray square of 2 * half_side pixels around a place of the image, cut off at its borders."""
    column, row = int(x * image.width), int(y * image.height)
    box = (max(0, column - half_side), max(0, row - half_side), min(image.width, column + half_side), min(image.height, row + half_side))
    if box[0] < box[2] and box[1] < box[3]:
        image = image.copy()
        image.paste(_GRAY, box)
    return image


def _through_table(image: Image.Image, table: bytes) -> Image.Image:
    # bytes.translate is five times as fast as Image.point, which rounds 768 entries in Python first.
    return Image.frombytes("RGB", image.size, image.tobytes().translate(table))


def _through_three_tables(pixels_HWC: npt.NDArray[np.uint8], tables: list[bytes]) -> Image.Image:
    result = np.empty_like(pixels_HWC)
    for channel, table in enumerate(tables):
        levels = pixels_HWC[:, :, channel].tobytes().translate(table)
        result[:, :, channel] = np.frombuffer(levels, np.uint8).reshape(pixels_HWC.shape[:2])
    return Image.fromarray(result)


def _autocontrast(image: Image.Image, _: float) -> Image.Image:
    # An RGB image has a pair for each channel; for one channel it would be a pair alone.
    extrema = cast(tuple[tuple[int, int], ...], image.getextrema())
    return _through_three_tables(np.asarray(image), [_stretched(*bounds) for bounds in extrema])


@lru_cache(maxsize=65536)
def _stretched(low: int, high: int) -> bytes:
    levels = np.arange(256)
    if high <= low:
        return levels.astype(np.uint8).tobytes()
    scale = 255 / (high - low)
    stretched: npt.NDArray[np.uint8] = np.clip(levels * scale - low * scale, 0, 255).astype(np.uint8)
    return stretched.tobytes()


def _equalize(image: Image.Image, _: float) -> Image.Image:
    pixels_HWC = np.asarray(image)
    return _through_three_tables(pixels_HWC, [_equalized(pixels_HWC[:, :, channel]) for channel in range(3)])


def _equalized(levels_HW: npt.NDArray[np.uint8]) -> bytes:
    histogram = np.bincount(levels_HW.reshape(-1), minlength=256)
    # The last level that occurs does not count, so that it maps to 255.
    last = histogram[int(levels_HW.max())]
    step = (levels_HW.size - int(last)) // 255
    if step == 0:
        return _IDENTITY
    table = (histogram.cumsum() - histogram + step // 2) // step
    levels: npt.NDArray[np.uint8] = np.minimum(table, 255).astype(np.uint8)
    return levels.tobytes()


def _invert(image: Image.Image, _: float) -> Image.Image:
    return _through_table(image, _INVERTED)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, _NEAREST, fillcolor=_GRAY)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return _through_table(image, _posterized(int(bits)))


def _solarize(image: Image.Image, threshold: float) -> Image.Image:
    return _through_table(image, _solarized(int(threshold)))


def _solarize_add(image: Image.Image, addend: float) -> Image.Image:
    return _through_table(image, _solarized_after_adding(int(addend)))


def _color(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    gray = np.frombuffer(image.convert("L").tobytes(), np.uint8)
    return _through_table(image, _blended(int(gray.mean() + 0.5), factor))


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return _through_table(image, _blended(0, factor))


def _sharpness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(image.filter(ImageFilter.SMOOTH), image, factor)


def _shear_x(image: Image.Image, tangent: float) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, tangent, 0, 0, 1, 0), _NEAREST, fillcolor=_GRAY)


def _shear_y(image: Image.Image, tangent: float) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, 0, 0, tangent, 1, 0), _NEAREST, fillcolor=_GRAY)


def _translate_x(image: Image.Image, pixels: float) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, 0, pixels, 0, 1, 0), _NEAREST, fillcolor=_GRAY)


def _translate_y(image: Image.Image, pixels: float) -> Image.Image:
    return image.transform(image.size, _AFFINE, (1, 0, 0, 0, 1, pixels), _NEAREST, fillcolor=_GRAY)


_IDENTITY = bytes(range(256))
_INVERTED = bytes(range(255, -1, -1))


@lru_cache(maxsize=16)
def _posterized(bits: int) -> bytes:
    keep = 256 - (1 << (8 - bits))
    return bytes(level & keep for level in range(256))


@lru_cache(maxsize=512)
def _solarized(threshold: int) -> bytes:
    return bytes(level if level < threshold else 255 - level for level in range(256))


@lru_cache(maxsize=512)
def _solarized_after_adding(addend: int) -> bytes:
    return bytes(min(255, level + addend) if level < 128 else level for level in range(256))


@lru_cache(maxsize=4096)
def _blended(gray: int, factor: float) -> bytes:
    """What Pillow's blend makes of every level between a gray (factor 0) and the level itself (1)."""
    return Image.blend(Image.new("L", (256, 1), gray), _RAMP, factor).tobytes()


_FUNCTIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "SolarizeAdd": _solarize_add,
}
