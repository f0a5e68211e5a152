"""What a network takes is the same on the way through torch as on the way through numpy."""

from __future__ import annotations

import numpy as np
import torch

from ml.config import ImageConfig
from ml.normalization import Normalization
from ml.pixels import Preprocessing, normalize


def test_torch_and_numpy_give_the_same_bits() -> None:
    preprocessing = Preprocessing.from_config(ImageConfig(size=40))
    images_NHWC = np.random.default_rng(3).integers(0, 256, (5, 40, 24, 3), dtype=np.uint8)

    normalized = Normalization(preprocessing, torch.device("cpu"))(torch.from_numpy(images_NHWC))

    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(normalized.numpy(), normalize(images_NHWC, preprocessing))
