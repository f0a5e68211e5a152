"""Noise of single pixels. N images, H W rows and columns, C = 3 channels."""

from __future__ import annotations

import numpy as np

from ml.robustness.draws import Draws
from ml.robustness.levels import Bytes, to_bytes, to_levels
from ml.robustness.severities import Constants


def gaussian_noise(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Adds normal noise; the constant is its deviation as a share of 255."""
    [deviation] = constants
    noise_NHWC = draws.normals("noise", *images_NHWC.shape[1:])
    noise_NHWC *= np.float32(deviation * 255)
    noise_NHWC += images_NHWC
    return to_bytes(noise_NHWC)


def shot_noise(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Counts photons: Poisson around each level; the constant is how many a level of 255 sends."""
    [photons] = constants
    means_NHWC = to_levels(images_NHWC)
    means_NHWC *= np.float32(photons / 255)
    counts_NHWC = draws.poisson("noise", means_NHWC)
    counts_NHWC *= np.float32(255 / photons)
    return to_bytes(counts_NHWC)


def impulse_noise(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Salt and pepper: the constant is the share of values (not pixels) that become 0 or 255, as many of each."""
    [share] = constants
    chance_NHWC = draws.uniforms("noise", *images_NHWC.shape[1:])
    noisy_NHWC = images_NHWC.copy()
    noisy_NHWC[chance_NHWC < np.float32(share)] = 0
    noisy_NHWC[chance_NHWC < np.float32(share / 2)] = 255
    return noisy_NHWC


def speckle_noise(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """Normal noise in proportion to each level; the constant is its deviation as a share of the level."""
    [deviation] = constants
    noise_NHWC = draws.normals("noise", *images_NHWC.shape[1:])
    noise_NHWC *= np.float32(deviation)
    noise_NHWC += 1
    noise_NHWC *= images_NHWC
    return to_bytes(noise_NHWC)
