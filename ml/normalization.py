"""From the bytes that travel to the numbers that a network takes, on the device where the network is."""

from __future__ import annotations

import torch
from torch import Tensor

from ml.pixels import Preprocessing


class Normalization:
    """`level * scale + bias` per channel, as `ml.pixels.normalize` computes it."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        scale, bias = preprocessing.scale_and_bias()
        self._scale = torch.from_numpy(scale).to(device)
        self._bias = torch.from_numpy(bias).to(device)

    def __call__(self, images_NHWC: Tensor) -> Tensor:
        """float32 [N, C, H, W], channels last in memory, of uint8 images [N, H, W, C] on the same device."""
        num_images, height, width, channels = images_NHWC.shape
        # A whole row of pixels a time: on a CPU that is ten times as fast as three values a time, and the bits are the same.
        rows = images_NHWC.contiguous().view(num_images, height, width * channels).float()
        rows.mul_(self._scale.repeat(width)).add_(self._bias.repeat(width))
        return rows.view(num_images, height, width, channels).permute(0, 3, 1, 2)
