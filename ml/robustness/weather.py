"""Snow, frost and fog. N images, H W rows and columns, C = 3 channels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.robustness import filters
from ml.robustness.draws import Draws
from ml.robustness.frost import NUM_TEXTURES, textures
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels, to_nearest_bytes
from ml.robustness.severities import SMALL_SIDE, Constants

GRAY = np.array([0.299, 0.587, 0.114], np.float32)
"""How much red, green and blue give of a gray level (ITU-R BT.601)."""
SNOW_DEGREES = (-135.0, -45.0)
"""Snow falls from above, from the left or from the right."""


def snow(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Flakes in motion, twice, the second time turned by 180 degrees, over a paler image.

    (mean and deviation of the noise that flakes are cut from, its zoom, the level below which there is no flake, radius and
    deviation of the motion in pixels, what stays of the image when it turns pale); levels as shares of 255.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    low, high = SNOW_DEGREES
    degrees_N = low + draws.uniforms("direction").astype(np.float64) * (high - low)
    flakes_NHW1 = snowflakes(draws.normals("flakes", *images_NHWC.shape[1:3]), mean, deviation, zoom, threshold)
    fallen_NHW1 = moving_snow(flakes_NHW1, int(radius), sigma, degrees_N)
    return under_snow(to_levels(images_NHWC), fallen_NHW1, kept)


def snowflakes(normal_NHW: Floats, mean: float, deviation: float, zoom: float, threshold: float) -> Floats:
    """Whole levels [N, H, W, 1]: standard normal noise moved and stretched, zoomed, and emptied below the threshold."""
    flakes_NHW1 = (normal_NHW * np.float32(deviation) + np.float32(mean))[..., None]
    flakes_NHW1 = filters.zoom_map(*normal_NHW.shape[1:], (zoom,))(flakes_NHW1)
    flakes_NHW1[flakes_NHW1 < np.float32(threshold)] = 0
    flakes_NHW1 *= 255
    return to_levels(to_bytes(flakes_NHW1))


def moving_snow(flakes_NHW1: Floats, radius: int, sigma: float, degrees_N: NDArray[np.float64]) -> Floats:
    """The flakes in motion, rounded to whole levels."""
    return to_levels(to_nearest_bytes(filters.motion_blur(flakes_NHW1, radius, sigma, degrees_N.tolist())))


def under_snow(levels_NHWC: Floats, snow_NHW1: Floats, kept: float) -> Bytes:
    """The image drawn towards a pale gray, with the snow upon it. Changes `levels_NHWC`."""
    pale_NHW1 = gray(levels_NHWC) * np.float32(1.5) + np.float32(127.5)
    whitened_NHWC = np.maximum(levels_NHWC, pale_NHW1)
    whitened_NHWC *= np.float32(1 - kept)
    levels_NHWC *= np.float32(kept)
    levels_NHWC += whitened_NHWC
    levels_NHWC += snow_NHW1 + snow_NHW1[:, ::-1, ::-1]
    return to_bytes(levels_NHWC)


def gray(levels_NHWC: Floats) -> Floats:
    """Gray levels [N, H, W, 1]."""
    mixed: Floats = levels_NHWC[..., :1] * GRAY[0] + levels_NHWC[..., 1:2] * GRAY[1] + levels_NHWC[..., 2:] * GRAY[2]
    return mixed


def frost(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Frost on the pane: (share of the image, share of the texture). Where to cut which texture is drawn."""
    of_image, of_frost = constants
    num_images, height, width, _ = images_NHWC.shape
    patches_NHWC = np.empty(images_NHWC.shape, np.uint8)
    available = _textures_for(height, width)
    chance_N3 = draws.uniforms("place", 3).astype(np.float64).tolist()
    for row in range(num_images):
        which, down, right = chance_N3[row]
        top, left = int(down * (available.shape[1] - height)), int(right * (available.shape[2] - width))
        patches_NHWC[row] = available[int(which * NUM_TEXTURES), top : top + height, left : left + width]
    frozen_NHWC = to_levels(patches_NHWC)
    frozen_NHWC *= np.float32(of_frost)
    frozen_NHWC += to_levels(images_NHWC) * np.float32(of_image)
    return to_bytes(frozen_NHWC)


def _textures_for(height: int, width: int) -> Bytes:
    """Larger than the image: drawn out to half as large again where our own are too small."""
    made = textures(small=min(height, width) <= SMALL_SIDE)
    if max(height, width) < made.shape[1]:
        return made
    return _enlarged(int(max(height, width) * 1.5))


@lru_cache(maxsize=2)
def _enlarged(side: int) -> Bytes:
    made = textures(small=False)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in made])


def fog(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """A plasma fractal on top, and as much darker that the brightest level stays: (amount, decay of the fractal)."""
    amount, decay = constants
    height, width = images_NHWC.shape[1:3]
    brightest_N111 = images_NHWC.max(axis=(1, 2, 3), keepdims=True).astype(np.float32)
    plasma_NHW = plasma(draws, max(height, width), decay)[:, :height, :width]
    foggy_NHWC = images_NHWC + (plasma_NHW * np.float32(amount * 255))[..., None]
    foggy_NHWC *= brightest_N111 / (brightest_N111 + np.float32(amount * 255))
    return to_bytes(foggy_NHWC)


def plasma(draws: Draws, side: int, decay: float) -> Floats:
    """Heights in [0, 1] by diamonds and squares, [N, M, M], M the next power of two; each halving divides the roughness by `decay`.

    The map is a torus: what is beyond its border comes from the other side.
    """
    length = 1 << (side - 1).bit_length()
    chance = draws.uniforms("plasma", length * length)
    chance *= 2
    chance -= 1
    heights_NMM = np.zeros((len(draws), length, length), np.float32)
    used, step, roughness = 0, length, 100.0

    def roughened(sums: Floats) -> Floats:
        nonlocal used
        count = sums[0].size
        # The public code draws within the roughness and multiplies by it again.
        rough = chance[:, used : used + count].reshape(sums.shape) * np.float32(roughness**2)
        used += count
        rough += sums / 4
        return rough

    while step >= 2:
        half = step // 2
        corners = heights_NMM[:, ::step, ::step]
        beside = corners + np.roll(corners, -1, axis=1)
        heights_NMM[:, half::step, half::step] = roughened(beside + np.roll(beside, -1, axis=2))
        centers = heights_NMM[:, half::step, half::step]
        heights_NMM[:, ::step, half::step] = roughened(centers + np.roll(centers, 1, axis=1) + corners + np.roll(corners, -1, axis=2))
        heights_NMM[:, half::step, ::step] = roughened(centers + np.roll(centers, 1, axis=2) + corners + np.roll(corners, -1, axis=1))
        step, roughness = half, roughness / decay
    heights_NMM -= heights_NMM.min(axis=(1, 2), keepdims=True)
    heights_NMM /= np.maximum(heights_NMM.max(axis=(1, 2), keepdims=True), np.float32(1e-12))
    return heights_NMM
