"""Brightness, contrast, saturation. N images, H W rows and columns, C = 3 channels."""

from __future__ import annotations

import numpy as np

from ml.robustness.draws import Draws
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels
from ml.robustness.severities import Constants


def brightness(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Adds the constant, as a share of 255, to the value of HSV; negative ones darken."""
    [change] = constants
    return to_bytes(brighten(to_levels(images_NHWC), np.float32(change * 255)))


def brighten(levels_NHWC: Floats, change: np.float32) -> Floats:
    """Levels with the value of HSV changed: hue and saturation stay, so the three channels are scaled alike. Black becomes gray."""
    value_NHW1 = levels_NHWC.max(axis=-1, keepdims=True)
    changed_NHW1 = np.clip(value_NHW1 + change, 0, 255)
    scaled_NHWC: Floats = levels_NHWC * (changed_NHW1 / np.maximum(value_NHW1, 1))
    black_NHW = value_NHW1[..., 0] == 0
    scaled_NHWC[black_NHW] = changed_NHW1[black_NHW]
    return scaled_NHWC


def contrast(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Draws each channel towards its mean over the image; the constant is what stays of the distance."""
    [share] = constants
    height, width = images_NHWC.shape[1:3]
    # Summed as whole numbers: exact, in whatever order.
    means_N11C = (images_NHWC.sum(axis=(1, 2), keepdims=True, dtype=np.int64) / (height * width)).astype(np.float32)
    levels_NHWC = to_levels(images_NHWC)
    levels_NHWC *= np.float32(share)
    levels_NHWC += means_N11C * np.float32(1 - share)
    return to_bytes(levels_NHWC)


def saturate(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Saturation of HSV times the first constant plus the second; gray counts as red, as in scikit-image."""
    factor, addend = constants
    levels_NHWC = to_levels(images_NHWC)
    value_NHW1 = levels_NHWC.max(axis=-1, keepdims=True)
    distance_NHWC = value_NHW1 - levels_NHWC
    spread_NHW1 = distance_NHWC.max(axis=-1, keepdims=True)
    saturation_NHW1 = spread_NHW1 / np.maximum(value_NHW1, 1)
    wanted_NHW1 = np.clip(saturation_NHW1 * np.float32(factor) + np.float32(addend), 0, 1)
    # The channel farthest below the value lies saturation * value below it, the others in proportion.
    distance_NHWC *= wanted_NHW1 * value_NHW1 / np.maximum(spread_NHW1, 1)
    gray_NHW = spread_NHW1[..., 0] == 0
    distance_NHWC[gray_NHW] = (wanted_NHW1 * value_NHW1)[gray_NHW] * np.array([0, 1, 1], np.float32)
    return to_bytes(value_NHW1 - distance_NHWC)
