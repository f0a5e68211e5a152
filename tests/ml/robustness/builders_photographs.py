"""Real pictures at any size, the same on every call: twelve squares of scikit-learn's two photographs. No torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_sample_image

SQUARE = 224


@lru_cache(maxsize=4)
def build_photographs(side: int = 32, *, count: int = 12) -> npt.NDArray[np.uint8]:
    """[count, side, side, 3]; read-only. What reference_changes.json was measured on."""
    sources = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    squares = []
    for number in range(count):
        row, column = divmod(number // 2, 3)
        left, top = 20 + column * 190, 5 + (row % 2) * 190
        square = sources[number % 2].crop((left, top, left + SQUARE, top + SQUARE))
        squares.append(np.asarray(square.resize((side, side), Image.Resampling.BOX)))
    images = np.stack(squares)
    images.setflags(write=False)
    return images
