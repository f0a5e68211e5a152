"""Out of focus, behind glass, in motion, zoomed. N images, H W rows and columns, C = 3 channels."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ml.robustness import filters
from ml.robustness.draws import Draws
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels, to_nearest_bytes
from ml.robustness.severities import Constants

MOTION_DEGREES = 45.0
"""Motion goes to the right, up to so far up or down."""


def defocus_blur(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """A disk around each pixel: (radius in pixels, deviation with which the disk's edge is softened)."""
    radius, softness = constants
    return to_bytes(filters.convolve(to_levels(images_NHWC), disk(radius, softness)))


@lru_cache(maxsize=16)
def disk(radius: float, softness: float) -> NDArray[np.float64]:
    """The kernel, without borders of zeros; its sum is 1."""
    # The public code lays small disks into 17 pixels and mirrors what the softening would move beyond them.
    reach, soft_reach = (8, 1) if radius <= 8 else (int(radius), 2)
    at = np.arange(-reach, reach + 1)
    sharp = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-soft_reach, soft_reach + 1) / softness) ** 2)
    matrix = np.zeros((len(at), len(at)))
    for step, weight in zip(range(-soft_reach, soft_reach + 1), weights / weights.sum(), strict=True):
        np.add.at(matrix, (np.arange(len(at)), filters.mirror(np.arange(len(at)) + step, len(at))), weight)
    soft = matrix @ sharp @ matrix.T
    # Below a millionth of the kernel nothing can be seen in 255 levels.
    soft[soft < soft.sum() * 1e-6] = 0
    reach = int(np.abs(at[soft.any(axis=0)]).max())
    kernel: NDArray[np.float64] = soft[len(at) // 2 - reach :, len(at) // 2 - reach :][: 2 * reach + 1, : 2 * reach + 1]
    kernel = kernel / kernel.sum()
    kernel.setflags(write=False)
    return kernel


def gaussian_blur(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """A normal curve around each pixel; the constant is its deviation in pixels."""
    [sigma] = constants
    return to_bytes(filters.gaussian_blur(to_levels(images_NHWC), sigma))


def glass_blur(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Blurred, pixels moved at random, blurred again: (deviation of the blur, pixels that a pixel moves at most, rounds).

    A pixel *takes over* the one that it is moved to, from the last pixel to the first. The paper speaks of swapping, but the
    public code overwrites one of the two before it reads it, and the public files were made so.
    """
    sigma, shift, rounds = constants[0], int(constants[1]), int(constants[2])
    num_images, height, width, _ = images_NHWC.shape
    blurred_NHWC = to_bytes(filters.gaussian_blur(to_levels(images_NHWC), sigma))
    moves_NR2HW = draws.uniforms("moves", rounds, 2, height, width)
    moves_NR2HW *= 2 * shift
    # From -shift up to shift - 1: numpy's randint leaves out its upper end, in the public code too.
    steps_NR2HW = moves_NR2HW.astype(np.intp) - shift
    pixels_NPC = blurred_NHWC.reshape(num_images, height * width, -1)
    starts_N11 = (np.arange(num_images) * height * width)[:, None, None]
    for number in range(rounds):
        sources_NHW = _taken_from(steps_NR2HW[:, number, 0], steps_NR2HW[:, number, 1], shift)
        flat = pixels_NPC.reshape(num_images * height * width, -1)
        pixels_NPC = flat.take(sources_NHW + starts_N11, axis=0).reshape(pixels_NPC.shape)
    return to_bytes(filters.gaussian_blur(to_levels(pixels_NPC.reshape(images_NHWC.shape)), sigma))


def _taken_from(down_NHW: NDArray[np.intp], right_NHW: NDArray[np.intp], shift: int) -> NDArray[np.intp]:
    """The pixel of its image, as row * W + column, whose color each pixel ends up with after one round."""
    _, height, width = down_NHW.shape
    here_HW = np.arange(height * width).reshape(height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    moves_HW = (rows > shift) & (rows <= height - shift) & (columns > shift) & (columns <= width - shift)
    # Moves never leave the image: the largest row that moves is H - shift, its largest step shift - 1.
    sources_NHW = np.where(moves_HW, here_HW + down_NHW * width + right_NHW, here_HW)
    if shift == 1:
        # Every step is up or to the left, to a pixel that has not moved yet.
        return sources_NHW
    # A later pixel (below, or right in the row) moved before: what counts is what that one took over, and so on to the end.
    flat_NP = sources_NHW.reshape(len(sources_NHW), -1)
    earlier_NP = flat_NP > here_HW.ravel()
    origin_NP = np.where(earlier_NP, flat_NP, here_HW.ravel())
    for _ in range(max(1, math.ceil(math.log2(height * width)))):
        further_NP = np.take_along_axis(origin_NP, origin_NP, axis=1)
        if np.array_equal(further_NP, origin_NP):
            break
        origin_NP = further_NP
    # The last of such a chain takes from a pixel that had not moved.
    return np.take_along_axis(flat_NP, origin_NP, axis=1).reshape(sources_NHW.shape)


def motion_blur(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Moved along a random direction: (radius in pixels, deviation in pixels along the ray)."""
    degrees_N = (draws.uniforms("direction").astype(np.float64) * 2 - 1) * MOTION_DEGREES
    moved_NHWC: Floats = filters.motion_blur(to_levels(images_NHWC), int(constants[0]), constants[1], degrees_N.tolist())
    return to_nearest_bytes(moved_NHWC)


def zoom_blur(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Mean of the image and of it zoomed by 1, 1 + step, ...: (number of factors, step)."""
    count, step = int(constants[0]), constants[1]
    factors = (1.0, *(1 + step * at for at in range(count)))
    return to_bytes(filters.zoom_map(*images_NHWC.shape[1:3], factors)(to_levels(images_NHWC)))
