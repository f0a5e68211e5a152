"""Linear filters as sums of shifted images.

Every sum is made of numpy's single multiplications and additions, in one order for every pixel: no BLAS and no convolution of
torch, whose bits depend on where in a batch an image lies. So an image's result does not depend on how its set was cut.

N images, H W rows and columns, C channels; P = H * W pixels, K taps of a filter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ml.robustness.levels import Floats

Tap = tuple[int, int, float]
"""Rows down, columns right, weight: what a pixel gets from the pixel that lies there."""

_LONG = 100
"""Filters of more taps than this go through Fourier space."""


def mirror(places: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """Places outside 0..length-1 seen in a mirror that stands *on* the last pixel (OpenCV's reflect-101)."""
    if length == 1:
        return np.zeros_like(places)
    around = np.abs(places) % (2 * length - 2)
    folded: NDArray[np.intp] = np.minimum(around, 2 * length - 2 - around)
    return folded


def mirror_between(places: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """The same with the mirror *behind* the last pixel, which so is seen twice (scipy's "reflect")."""
    around = places % (2 * length)
    folded: NDArray[np.intp] = np.minimum(around, 2 * length - 1 - around)
    return folded


def add_taps(padded_HWC: Floats, taps: Iterable[Tap], *, margin: int, out_HWC: Floats, room_HWC: Floats) -> None:
    """Sum into `out_HWC` what the taps see; also with a leading axis N. `padded_HWC` is larger by `margin` on all four sides."""
    height, width = out_HWC.shape[-3:-1]
    out_HWC[...] = 0
    for down, right, weight in taps:
        top, left = margin + down, margin + right
        np.multiply(padded_HWC[..., top : top + height, left : left + width, :], np.float32(weight), out=room_HWC)
        out_HWC += room_HWC


def convolve(levels_NHWC: Floats, kernel: NDArray[np.float64]) -> Floats:
    """Each pixel becomes the sum of its neighbors by the kernel, odd of side and symmetric; reflect-101 at the borders."""
    margin = kernel.shape[0] // 2
    padded_NHWC = pad(levels_NHWC, margin, "reflect")
    rows, columns = np.nonzero(kernel)
    if len(rows) > _LONG:
        return np.stack([_through_fourier_space(padded_HWC, kernel) for padded_HWC in padded_NHWC])
    taps = [(int(row) - margin, int(column) - margin, float(kernel[row, column])) for row, column in zip(rows, columns, strict=True)]
    out_NHWC = np.empty_like(levels_NHWC)
    add_taps(padded_NHWC, taps, margin=margin, out_HWC=out_NHWC, room_HWC=np.empty_like(levels_NHWC))
    return out_NHWC


def _through_fourier_space(padded_HWC: Floats, kernel: NDArray[np.float64]) -> Floats:
    # In float64, one image at a time: its bits cannot depend on the batch.
    size = padded_HWC.shape[:2]
    spectrum = np.fft.rfft2(kernel, s=size)[..., None] * np.fft.rfft2(padded_HWC.astype(np.float64), axes=(0, 1))
    whole_HWC = np.fft.irfft2(spectrum, s=size, axes=(0, 1))
    reach = kernel.shape[0] - 1
    return whole_HWC[reach:, reach:].astype(np.float32)


def pad(levels_NHWC: Floats, margin: int, mode: str) -> Floats:
    """Larger by `margin` on all four sides; `mode` is numpy's: "reflect" is reflect-101, "edge" repeats the border."""
    if margin == 0:
        return levels_NHWC
    height, width = levels_NHWC.shape[1:3]
    rows, columns = np.arange(-margin, height + margin), np.arange(-margin, width + margin)
    if mode == "reflect":
        rows, columns = mirror(rows, height), mirror(columns, width)
    # Two gathers are a quarter of the time of np.pad, which visits every side of every axis.
    return levels_NHWC.take(rows.clip(0, height - 1), axis=1).take(columns.clip(0, width - 1), axis=2)


def gaussian_weights(sigma: float, *, truncate: float = 4) -> list[float]:
    """A normal curve over -radius..radius that sums to 1, with scikit-image's radius: `truncate` deviations, rounded."""
    radius = gaussian_radius(sigma, truncate=truncate)
    weights = [math.exp(-0.5 * (at / sigma) ** 2) if at else 1.0 for at in range(-radius, radius + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def gaussian_radius(sigma: float, *, truncate: float = 4) -> int:
    """Pixels that a Gaussian blur looks at to each side."""
    return int(truncate * sigma + 0.5)


def gaussian_blur(levels_NHWC: Floats, sigma: float) -> Floats:
    """Rows, then columns; the border repeats, as in scikit-image's `gaussian`."""
    weights = gaussian_weights(sigma)
    margin = len(weights) // 2
    if margin == 0:
        return levels_NHWC
    along = [(0, at - margin, weight) for at, weight in enumerate(weights)]
    height, width = levels_NHWC.shape[1:3]
    padded_NHWC = pad(levels_NHWC, margin, "edge")
    rows_NHWC = np.empty((len(padded_NHWC), height + 2 * margin, width, padded_NHWC.shape[-1]), np.float32)
    room_NHWC = np.empty_like(rows_NHWC)
    rows_NHWC[...] = 0
    for _, right, weight in along:
        left = margin + right
        np.multiply(padded_NHWC[:, :, left : left + width], np.float32(weight), out=room_NHWC)
        rows_NHWC += room_NHWC
    out_NHWC = np.zeros_like(levels_NHWC)
    narrow_NHWC = np.empty_like(levels_NHWC)
    for down, weight in enumerate(weights):
        np.multiply(rows_NHWC[:, down : down + height], np.float32(weight), out=narrow_NHWC)
        out_NHWC += narrow_NHWC
    return out_NHWC


def smooth_fields(fields_NHW: NDArray[np.float64], sigma: float, *, truncate: float) -> NDArray[np.float64]:
    """Gaussian blur of fields of numbers, mirrored behind their borders however far the curve reaches.

    A field beside its mirror images repeats every 2 * length, which is what Fourier space takes for granted; so the cost does
    not grow with sigma. No BLAS: its threads wait for each other longer than a field this small takes.
    """
    height, width = fields_NHW.shape[-2:]
    beside_NHW = np.concatenate([fields_NHW, fields_NHW[..., ::-1, :]], axis=-2)
    spectrum = np.fft.rfft2(np.concatenate([beside_NHW, beside_NHW[..., ::-1]], axis=-1))
    spectrum *= _response(2 * height, sigma, truncate)[:, None] * _response(2 * width, sigma, truncate)[: width + 1]
    smooth: NDArray[np.float64] = np.fft.irfft2(spectrum, s=(2 * height, 2 * width))[..., :height, :width]
    return smooth


@lru_cache(maxsize=64)
def _response(length: int, sigma: float, truncate: float) -> NDArray[np.float64]:
    """What the blur leaves of each frequency of a line that repeats after `length` pixels."""
    weights = gaussian_weights(sigma, truncate=truncate)
    around = np.zeros(length)
    np.add.at(around, (np.arange(len(weights)) - len(weights) // 2) % length, weights)
    return np.fft.fft(around).real


class PixelMap:
    """A fixed linear map of pixels: each pixel becomes a weighted sum of a few others, the same for every image and channel."""

    def __init__(self, targets: NDArray[np.intp], sources: NDArray[np.intp], weights: NDArray[np.float64], *, num_pixels: int) -> None:
        """Entry by entry: `targets` gets `weights` times `sources`; entries for the same two pixels add up."""
        pairs, place = np.unique(targets * num_pixels + sources, return_inverse=True)
        summed = np.bincount(place, weights)
        targets, sources = pairs // num_pixels, pairs % num_pixels
        counts_P = np.bincount(targets, minlength=num_pixels)
        # Pixels with many sources first: those that have a k-th source are then the first so many.
        order_P = np.argsort(-counts_P, kind="stable")
        self._place_P = np.argsort(order_P, kind="stable")
        starts_P = (np.cumsum(counts_P) - counts_P)[order_P]
        sorted_P = counts_P[order_P]
        self._taps: list[tuple[NDArray[np.intp], Floats]] = []
        for k in range(int(sorted_P[0])):
            entries = starts_P[: np.count_nonzero(sorted_P > k)] + k
            self._taps.append((sources[entries], summed[entries].astype(np.float32)[:, None]))

    def __call__(self, levels_NHWC: Floats) -> Floats:
        num_images, height, width, channels = levels_NHWC.shape
        # Pixels first, so that one gather moves a whole row of images and channels.
        levels_PM = levels_NHWC.reshape(num_images, height * width, channels).transpose(1, 0, 2).reshape(height * width, -1)
        out_PM = np.zeros_like(levels_PM)
        for sources, weights in self._taps:
            seen = levels_PM.take(sources, axis=0)
            seen *= weights
            out_PM[: len(sources)] += seen
        out_PNC = out_PM.take(self._place_P, axis=0).reshape(height * width, num_images, channels)
        return np.ascontiguousarray(out_PNC.transpose(1, 0, 2)).reshape(levels_NHWC.shape)


@lru_cache(maxsize=64)
def zoom_map(height: int, width: int, factors: Sequence[float]) -> PixelMap:
    """Mean over the factors of the image zoomed into its center, bilinear; a tuple of factors.

    As scipy's zoom makes it: the cut ceil(H / factor) wide is stretched so that its corner pixels land on corner pixels, and
    what the stretching leaves over is cut off.
    """
    num_pixels = height * width
    targets, sources, weights = [], [], []
    for factor in factors:
        for rows, row_weights in _zoomed_places(height, factor):
            for columns, column_weights in _zoomed_places(width, factor):
                targets.append(np.arange(num_pixels))
                sources.append((rows[:, None] * width + columns).ravel())
                weights.append((row_weights[:, None] * column_weights).ravel() / len(factors))
    entries = np.concatenate(weights)
    kept = entries > 0
    return PixelMap(np.concatenate(targets)[kept], np.concatenate(sources)[kept], entries[kept], num_pixels=num_pixels)


def _zoomed_places(length: int, factor: float) -> list[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """For a line: where the two neighbors of each pixel lie before the zoom, and their weights."""
    cut = math.ceil(length / factor)
    stretched = round(cut * factor)
    at = np.arange(length) + (stretched - length) // 2
    exact = (length - cut) // 2 + at.astype(np.float64) * ((cut - 1) / max(1, stretched - 1))
    low: NDArray[np.intp] = np.minimum(exact.astype(np.intp), length - 1)
    high: NDArray[np.intp] = np.minimum(low + 1, length - 1)
    share: NDArray[np.float64] = exact - low
    return [(low, 1 - share), (high, share)]


@lru_cache(maxsize=4096)
def motion_taps(radius: int, sigma: float, degrees: float) -> tuple[Tap, ...]:
    """Half a normal curve along a ray of 2 * radius + 1 pixels: what ImageMagick's motion blur sums.

    Each step lands on the nearest pixel; steps that land on one pixel are added up.
    """
    length = 2 * radius + 1
    weights = [math.exp(-((at / sigma) ** 2) / 2) for at in range(length)]
    total = math.fsum(weights)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    found: dict[tuple[int, int], float] = defaultdict(float)
    for at, weight in enumerate(weights):
        found[math.ceil(at * sine - 0.5), math.ceil(at * cosine - 0.5)] += weight / total
    return tuple((down, right, weight) for (down, right), weight in found.items())


def motion_blur(levels_NHWC: Floats, radius: int, sigma: float, degrees_N: Sequence[float]) -> Floats:
    """Each image moved along its own direction, in degrees; the border repeats."""
    margin = 2 * radius
    padded_NHWC = pad(levels_NHWC, margin, "edge")
    out_NHWC = np.empty_like(levels_NHWC)
    room_HWC = np.empty_like(levels_NHWC[0])
    for padded_HWC, out_HWC, degrees in zip(padded_NHWC, out_NHWC, degrees_N, strict=True):
        add_taps(padded_HWC, motion_taps(radius, sigma, degrees), margin=margin, out_HWC=out_HWC, room_HWC=room_HWC)
    return out_NHWC
