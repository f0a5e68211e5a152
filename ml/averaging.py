"""One guess from several views of an image: a network's mean over mirrored and zoomed views, and how many of them agree with it.

V views, M images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ml.config import ViewsConfig

_LEAST = 1e-30
"""What a probability of 0 counts as in the logarithm."""


class AveragedViews(nn.Module):
    """Shows each image to a network in several views. Gives [M, K + 1]: the logarithms of the mean probabilities, and the agreement."""

    def __init__(self, network: nn.Module, views: ViewsConfig, *, temperature: float = 1.0) -> None:
        """`temperature` divides the logits of each view, before their probabilities are averaged."""
        super().__init__()
        self.network, self.views, self.temperature = network, views, temperature

    def forward(self, images: Tensor) -> Tensor:
        """`images` are normalized, [M, C, H, W]."""
        probs_VMK = torch.stack(
            [functional.softmax(self.network(view).float() / self.temperature, dim=-1) for view in views_of(images, self.views)]
        )
        mean_MK = probs_VMK.mean(0)
        agreement_M = (probs_VMK.argmax(-1) == mean_MK.argmax(-1)).float().mean(0)
        return torch.cat([mean_MK.clamp_min(_LEAST).log(), agreement_M[:, None]], dim=1)


def is_plain(views: ViewsConfig) -> bool:
    """Whether the weak view is the only one."""
    return not views.flip and views.zooms == (1.0,)


def views_of(images: Tensor, views: ViewsConfig) -> list[Tensor]:
    """The views of a batch [M, C, H, W], each of its shape: parts by zoom, each followed by its mirror image."""
    found = []
    for zoom in views.zooms:
        for part in _parts(images, zoom, corners=views.corners):
            found += [part, part.flip(-1)] if views.flip else [part]
    return found


def _parts(images: Tensor, zoom: float, *, corners: bool) -> list[Tensor]:
    height, width = images.shape[-2:]
    rows, columns = max(1, round(zoom * height)), max(1, round(zoom * width))
    if (rows, columns) == (height, width):
        return [images]
    last_row, last_column = height - rows, width - columns
    places = [(last_row // 2, last_column // 2)]
    if corners:
        places += [(0, 0), (0, last_column), (last_row, 0), (last_row, last_column)]
    parts = [images[..., top : top + rows, left : left + columns] for top, left in places]
    return [functional.interpolate(part, (height, width), mode="bicubic", align_corners=False) for part in parts]
