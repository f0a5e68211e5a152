"""Pixels between bytes and numbers. All corruptions compute in levels from 0 to 255, as float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_HAIR = np.float32(1 / 1024)
"""Added before levels are cut to whole ones, so that a rounding error below a whole level does not cost that level."""


def to_levels(images: Bytes) -> Floats:
    """The same numbers as float32."""
    return images.astype(np.float32)


def to_bytes(levels: Floats) -> Bytes:
    """Clipped to 0..255 and cut (not rounded) to whole levels, as the public data sets were. Changes `levels`."""
    levels += _HAIR
    np.clip(levels, 0, 255, out=levels)
    return levels.astype(np.uint8)


def to_nearest_bytes(levels: Floats) -> Bytes:
    """Clipped and rounded: what came through ImageMagick or OpenCV as bytes. Changes `levels`."""
    levels += np.float32(0.5)
    return to_bytes(levels)
