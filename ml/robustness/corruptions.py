"""The corruptions of ImageNet-C and CIFAR-10-C on images in memory, reproducible image by image.

Written from the public code's constants and formulas, without ImageMagick and OpenCV; ml/robustness/severities.py holds the
constants. What differs: frost has textures of our own, defocus and elastic interpolate exactly where OpenCV rounds coordinates,
and randomness comes from each image's own key. N images, H W rows and columns, C = 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ml.errors import DataError
from ml.robustness import blur, color, digital, noise, spatter, weather
from ml.robustness.draws import Draws
from ml.robustness.filters import gaussian_radius
from ml.robustness.levels import Bytes
from ml.robustness.severities import Constants, constants_for

_CHUNK_PIXELS = 32 * 32 * 32
"""Pixels that are worked on at once: 32 small images in floats stay in a core's cache."""

_FUNCTIONS: dict[str, Callable[[Bytes, Constants, Draws], Bytes]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": color.brightness,
    "contrast": color.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": color.saturate,
}


def corrupt(images_NHWC: Bytes, corruption: str, severity: int, *, seed: int, indices: Sequence[int]) -> Bytes:
    """Corrupted copies of uint8 RGB images.

    `indices` are the images' places in their data set, one each: with the seed, the corruption and the severity they decide
    every draw, so an image comes out the same in whatever batch it stands. Images whose shorter side is at most 64 get CIFAR's
    constants, larger ones ImageNet's. DataError for an unknown corruption or severity, for arrays that are no such images, and
    for images smaller than the corruption's kernel.
    """
    check_images(images_NHWC, indices)
    height, width = images_NHWC.shape[1:3]
    constants = constants_for(corruption, severity, side=min(height, width))
    check_kernel(f"{corruption} at severity {severity}", kernel_side(corruption, constants), height=height, width=width)
    chunk = max(1, _CHUNK_PIXELS // (height * width))
    corrupted_NHWC = np.empty_like(images_NHWC)
    for start in range(0, len(images_NHWC), chunk):
        part = slice(start, start + chunk)
        draws = Draws(indices[part], seed, "corruption", corruption, int(severity))
        corrupted_NHWC[part] = _FUNCTIONS[corruption](images_NHWC[part], constants, draws)
    return corrupted_NHWC


def kernel_side(corruption: str, constants: Constants) -> int:
    """Pixels that an image must have in both directions."""
    match corruption, constants:
        case "defocus_blur", (radius, softness):
            return int(blur.disk(radius, softness).shape[0])
        case "gaussian_blur", (sigma,):
            return 2 * gaussian_radius(sigma) + 1
        case "glass_blur", (sigma, shift, _):
            return max(2 * gaussian_radius(sigma) + 1, 2 * int(shift) + 1)
        case ("motion_blur", (radius, _)) | ("snow", (_, _, _, _, radius, _, _)):
            return 2 * int(radius) + 1
        case "spatter", (_, _, sigma, _, _, _):
            return 2 * gaussian_radius(sigma) + 1
        case "pixelate", (ratio,):
            return math.ceil(1 / ratio)
        case "elastic_transform", _:
            # The three points of the affine map stand a third of the side apart.
            return 3
    return 1


def check_images(images_NHWC: Bytes, indices: Sequence[int]) -> None:
    """DataError unless these are uint8 RGB images with one index each."""
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3 or 0 in images_NHWC.shape[1:3]:
        raise DataError(f"images must be uint8 of shape [N, H, W, 3], got {images_NHWC.dtype} of {list(images_NHWC.shape)}")
    if len(indices) != len(images_NHWC):
        raise DataError(f"every image needs its index in the data set: got {len(indices)} for {len(images_NHWC)} images")


def check_kernel(name: str, kernel: int, *, height: int, width: int) -> None:
    """DataError for an image in which the kernel has no place."""
    if min(height, width) < kernel:
        raise DataError(
            f"{name} needs images of at least {kernel} x {kernel} pixels, its kernel's size; these have {height} x {width}",
            kernel_pixels=kernel,
            height=height,
            width=width,
        )
