"""Random numbers for a batch of images, each image's own: they depend on its index in the data set, never on its neighbors.

N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ml.determinism import ReusedGenerator, Word

Floats = NDArray[np.float32]


class Draws:
    """What chance says to the images of a batch. Each draw is named by a purpose; the same purpose gives the same numbers again."""

    def __init__(self, indices: Sequence[int], seed: int, *words: Word) -> None:
        """`indices` are the images' places in their data set; `words` name what is done to them."""
        # Plain integers: a draw is named by how its words print, and numpy's print otherwise.
        self.indices = [int(index) for index in indices]
        self._seed = int(seed)
        self._words = words
        self._generator_for = ReusedGenerator()

    def __len__(self) -> int:
        return len(self.indices)

    def normals(self, purpose: str, *shape: int) -> Floats:
        """Standard normal, [N, *shape]."""
        drawn = np.empty((len(self), *shape), np.float32)
        for row, generator in enumerate(self.generators(purpose)):
            generator.standard_normal(out=drawn[row : row + 1], dtype=np.float32)
        return drawn

    def uniforms(self, purpose: str, *shape: int) -> Floats:
        """Uniform in [0, 1), [N, *shape]."""
        drawn = np.empty((len(self), *shape), np.float32)
        for row, generator in enumerate(self.generators(purpose)):
            generator.random(out=drawn[row : row + 1], dtype=np.float32)
        return drawn

    def poisson(self, purpose: str, means: Floats) -> Floats:
        """Poisson with a mean per entry, in the shape [N, ...] of `means`."""
        drawn = np.empty(means.shape, np.float32)
        for row, generator in enumerate(self.generators(purpose)):
            drawn[row] = generator.poisson(means[row])
        return drawn

    def generators(self, purpose: str) -> Iterator[np.random.Generator]:
        """One generator after the other, image by image; each ends when the next begins."""
        for index in self.indices:
            yield self._generator_for(self._seed, *self._words, purpose, index)
