"""Textures of frost, made here: the public ones are photographs of others.

Each is a mixture of needles (sparse points drawn out along eight directions) over clouds (noise whose amplitude falls with its
frequency), brought to the mean and the deviation that the public textures have per channel, so that frost of a severity is as
strong as theirs. Seeded, the same on every call; they tile without a seam.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.determinism import generator_for
from ml.robustness.levels import Bytes

SIDE = 512
_SEED = 20190328
_SMALL = 0.2
"""The public code scales its textures by this for CIFAR."""
# Mean of red, green, blue and their mean deviation, in levels, of frost1 to frost5 in imagecorruptions 1.1.2; the second and the
# third file are the same there, and a sixth is never drawn.
_TONES = ((78, 149, 166, 20), (201, 205, 214, 22), (201, 205, 214, 22), (138, 153, 165, 29), (112, 123, 135, 43))
NUM_TEXTURES = len(_TONES)


@lru_cache(maxsize=2)
def textures(*, small: bool) -> Bytes:
    """[texture, row, column, channel], squares of 512 pixels; of 102 for small images."""
    made = np.stack([_texture(number) for number in range(NUM_TEXTURES)])
    if small:
        side = int(SIDE * _SMALL)
        made = np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in made])
    made.setflags(write=False)
    return made


def _texture(number: int) -> Bytes:
    generator = generator_for(_SEED, "frost", number)
    down = np.fft.fftfreq(SIDE)[:, None]
    right = np.fft.rfftfreq(SIDE)
    distance = np.hypot(down, right)
    distance[0, 0] = np.inf
    clouds = _standard(np.fft.irfft2(np.fft.rfft2(generator.standard_normal((SIDE, SIDE))) / distance, s=(SIDE, SIDE)))
    needles = np.zeros((SIDE, SIDE))
    for angle in generator.uniform(0, np.pi, 8):
        points = generator.random((SIDE, SIDE)) < 0.01
        along, across = down * np.sin(angle) + right * np.cos(angle), right * np.sin(angle) - down * np.cos(angle)
        # Deviations of 9 pixels along the needle and of 0.9 across it, as they are in Fourier space.
        drawn_out = np.exp(-2 * np.pi**2 * ((9 * along) ** 2 + (0.9 * across) ** 2))
        needles = np.maximum(needles, np.fft.irfft2(np.fft.rfft2(points) * drawn_out, s=(SIDE, SIDE)))
    gray = _standard(0.6 * clouds + 0.8 * _standard(needles))
    *tone, deviation = _TONES[number]
    return (np.array(tone) + deviation * gray[..., None] + 0.5).clip(0, 255).astype(np.uint8)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = (values - values.mean()) / values.std()
    return scaled
