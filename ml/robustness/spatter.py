"""Water and mud on the lens. N images, H W rows and columns, C = 3 channels.

Water follows the edges of its drops: Canny's edges, the distance to them, equalized and embossed, as the public code does it
with OpenCV. The distance is exact here and OpenCV's is not, by up to some percent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ml.robustness.draws import Draws
from ml.robustness.filters import gaussian_blur, pad
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels
from ml.robustness.severities import Constants

_WATER: Floats = np.array([175, 238, 238], np.float32)
"""Pale turquoise."""
_MUD: Floats = np.array([63, 42, 20], np.float32)
_LOW, _HIGH = 50, 150
"""Canny's thresholds on |dx| + |dy| of Sobel's operator: an edge begins at the higher and goes on to the lower."""
_FARTHEST = 20
"""Pixels beyond which every distance from an edge is the same."""
_EMBOSSED = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)


def spatter(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """(mean and deviation of the noise, its blur in pixels, where liquid begins, strength of water or softness of mud, 1 for mud)."""
    mean, deviation, sigma, threshold, strength, is_mud = constants
    liquid_NHW = liquid(draws.normals("liquid", *images_NHWC.shape[1:3]), mean, deviation, sigma, threshold)
    if not is_mud:
        return under_water(images_NHWC, liquid_NHW, strength)
    mud_NHW1 = gaussian_blur((liquid_NHW > np.float32(threshold)).astype(np.float32)[..., None], strength)
    mud_NHW1[mud_NHW1 < np.float32(0.8)] = 0
    muddy_NHWC: Floats = to_levels(images_NHWC) * (1 - mud_NHW1) + mud_NHW1 * _MUD
    return to_bytes(muddy_NHWC)


def liquid(normal_NHW: Floats, mean: float, deviation: float, sigma: float, threshold: float) -> Floats:
    """Where there is liquid, and how much: smooth noise, emptied below the threshold."""
    smooth_NHW = gaussian_blur((normal_NHW * np.float32(deviation) + np.float32(mean))[..., None], sigma)[..., 0]
    smooth_NHW[smooth_NHW < np.float32(threshold)] = 0
    return smooth_NHW


def under_water(images_NHWC: Bytes, liquid_NHW: Floats, strength: float) -> Bytes:
    """The images behind drops, which are brightest at their edges. Without a drop the image stays as it is."""
    # Clipped, where the public code would begin again at 0: a drop in millions.
    drops_NHW = np.minimum(liquid_NHW * 255, 255).astype(np.uint8)
    shine_NHW: Floats = np.stack([drops_HW * _relief(drops_HW) for drops_HW in drops_NHW])
    shine_NHW *= np.float32(strength) / np.maximum(shine_NHW.max(axis=(1, 2), keepdims=True), np.float32(1e-12))
    shining_NHWC: Floats = to_levels(images_NHWC) + shine_NHW[..., None] * _WATER
    return to_bytes(shining_NHWC)


def _relief(drops_HW: Bytes) -> Floats:
    """How much each pixel of a drop shines, as far as its edges say."""
    distance_HW = _box(distances(edges(drops_HW))).astype(np.uint8)
    embossed_HW = np.zeros(drops_HW.shape, np.float32)
    around_HW = pad(_equalized(distance_HW).astype(np.float32)[None, ..., None], 1, "reflect")[0, ..., 0]
    height, width = drops_HW.shape
    for (down, right), weight in np.ndenumerate(_EMBOSSED):
        embossed_HW += around_HW[down : down + height, right : right + width] * weight
    return _box(embossed_HW.clip(0, 255))


def _box(values_HW: Floats) -> Floats:
    """Mean of 3 x 3 pixels."""
    height, width = values_HW.shape
    around_HW = pad(values_HW[None, ..., None], 1, "reflect")[0, ..., 0]
    total_HW = sum(around_HW[down : down + height, right : right + width] for down in range(3) for right in range(3))
    return np.asarray(total_HW / np.float32(9), np.float32)


def _equalized(values_HW: Bytes) -> Bytes:
    counts = np.bincount(values_HW.ravel(), minlength=256)
    first = int(values_HW.min())
    rest = values_HW.size - int(counts[first])
    if rest == 0:
        return values_HW
    counts[first] = 0
    table = np.rint(counts.cumsum() * (255 / rest)).astype(np.uint8)
    return table[values_HW]


def distances(edges_HW: NDArray[np.bool_]) -> Floats:
    """Pixels to the nearest edge, at most 20."""
    far = _FARTHEST**2
    squares = np.arange(-_FARTHEST, _FARTHEST + 1) ** 2
    along_HW = _nearest(np.where(edges_HW, 0, far), squares, axis=1)
    return np.sqrt(np.minimum(_nearest(along_HW, squares, axis=0), far)).astype(np.float32)


def _nearest(costs_HW: NDArray[np.int64], squares: NDArray[np.int64], *, axis: int) -> NDArray[np.int64]:
    """Least sum of a pixel's cost and the square of the way to it, along one axis."""
    margin = [(0, 0), (0, 0)]
    margin[axis] = (_FARTHEST, _FARTHEST)
    padded = np.pad(costs_HW, margin, constant_values=2 * _FARTHEST**2)
    length = costs_HW.shape[axis]
    shifted = [padded.take(range(at, at + length), axis=axis) + square for at, square in enumerate(squares)]
    nearest: NDArray[np.int64] = np.minimum.reduce(shifted)
    return nearest


def edges(drops_HW: Bytes) -> NDArray[np.bool_]:
    """Canny's edges: the gradient's ridges above the lower threshold that hang together with one above the higher."""
    height, width = drops_HW.shape
    around_HW = np.pad(drops_HW.astype(np.int64), 1, mode="edge")

    def at(down: int, right: int) -> NDArray[np.int64]:
        return around_HW[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across_HW = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1)
    down_HW = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1)
    ridges_HW, strength_HW = _ridges(across_HW, down_HW)
    strong_HW = ridges_HW & (strength_HW > _HIGH)
    weak_HW = ridges_HW & (strength_HW > _LOW)
    while True:
        grown_HW = _grown(strong_HW) & weak_HW
        if np.array_equal(grown_HW, strong_HW):
            return strong_HW
        strong_HW = grown_HW


def _ridges(across_HW: NDArray[np.int64], down_HW: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Where the gradient |dx| + |dy| is largest along its own direction, one of four; and how large it is."""
    strength_HW = np.abs(across_HW) + np.abs(down_HW)
    padded_HW = np.pad(strength_HW, 1)
    height, width = strength_HW.shape

    def at(down: int, right: int) -> NDArray[np.int64]:
        return padded_HW[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    slope = np.tan(np.pi / 8)
    flat_HW = np.abs(down_HW) < slope * np.abs(across_HW)
    steep_HW = np.abs(down_HW) > (slope + 2) * np.abs(across_HW)
    falls_HW = (across_HW < 0) == (down_HW < 0)
    # Of two equal neighbors one counts, so that an edge is one pixel wide.
    ridge_HW = np.where(
        flat_HW,
        (strength_HW > at(0, -1)) & (strength_HW >= at(0, 1)),
        np.where(
            steep_HW,
            (strength_HW > at(-1, 0)) & (strength_HW >= at(1, 0)),
            np.where(
                falls_HW,
                (strength_HW > at(-1, -1)) & (strength_HW > at(1, 1)),
                (strength_HW > at(-1, 1)) & (strength_HW > at(1, -1)),
            ),
        ),
    )
    return ridge_HW, strength_HW


def _grown(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels and their eight neighbors."""
    height, width = mask_HW.shape
    padded_HW = np.pad(mask_HW, 1)
    grown: NDArray[np.bool_] = np.logical_or.reduce(
        [padded_HW[down : down + height, right : right + width] for down in range(3) for right in range(3)]
    )
    return grown
