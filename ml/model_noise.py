"""Dropout and stochastic depth whose rates differ between the labeled and the pseudo-labeled images of one forward pass.

One network sees both kinds together, so that batch norm sees the mixed batch; timm's layers have one rate for all rows. Here each row
of a batch has its own: the first B rows the labeled images' rate, the others the pseudo-labeled ones', times what fading has left of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ml import models
from ml.config import NoiseConfig
from ml.errors import RecipeError


@dataclass(slots=True, eq=False)
class Rows:
    """Which rows of the batch are labeled, and how much noise the others still get; set before each forward pass."""

    num_labeled: int = 0
    """Leading rows that are labeled."""
    noised_ratio: Tensor = field(default_factory=lambda: torch.ones(()))
    """What fading has left of the noise on pseudo-labeled rows. On the device, where a compiled network reads it anew each time."""

    def set(self, num_labeled: int, noised_ratio: float) -> None:
        self.num_labeled = num_labeled
        self.noised_ratio.fill_(noised_ratio)


@dataclass(slots=True, eq=False)
class RowRates:
    """The two rates of one layer."""

    labeled: float
    unlabeled: float
    rows: Rows

    def keep(self, features: Tensor) -> Tensor:
        """Probability of keeping, float32, one a row of `features`, shaped to be broadcast over it."""
        kept = torch.full((len(features), *(1,) * (features.ndim - 1)), 1 - self.labeled, device=features.device)
        kept[self.rows.num_labeled :] = 1 - self.unlabeled * self.rows.noised_ratio
        return kept


class RowDropPath(nn.Module):
    """Skips a residual branch row by row and divides what is kept by its probability, as timm's DropPath does for one rate."""

    def __init__(self, rates: RowRates) -> None:
        super().__init__()
        self.rates = rates

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return features
        keep = self.rates.keep(features)
        return features * (torch.bernoulli(keep) / keep).to(features.dtype)


class RowDropout:
    """Before a classifier: drops features row by row and divides what is kept by its probability, as dropout does for one rate."""

    def __init__(self, rates: RowRates) -> None:
        self.rates = rates

    def __call__(self, classifier: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        [features] = inputs
        if not classifier.training:
            return inputs
        keep = self.rates.keep(features)
        return (features * (torch.bernoulli(keep.expand_as(features)) / keep).to(features.dtype),)


def differs(labeled: NoiseConfig, unlabeled: NoiseConfig, fade_ratio: float) -> bool:
    """Whether one rate for all rows cannot serve."""
    rates, others = (labeled.dropout, labeled.stochastic_depth), (unlabeled.dropout, unlabeled.stochastic_depth)
    return rates != others or (fade_ratio > 0 and any(others))


def built_noise(labeled: NoiseConfig, unlabeled: NoiseConfig) -> NoiseConfig:
    """The rates that a network is to be built with before `split_rows`: the larger stochastic depth, and no dropout."""
    return replace(labeled, dropout=0.0, stochastic_depth=max(labeled.stochastic_depth, unlabeled.stochastic_depth))


def split_rows(network: nn.Module, labeled: NoiseConfig, unlabeled: NoiseConfig, device: torch.device) -> Rows:
    """Give a network that was built with `built_noise`, and lies on `device`, a rate a row.

    RecipeError when it has no linear classifier before which features could be dropped.
    """
    rows = Rows(noised_ratio=torch.ones((), device=device))
    most = max(labeled.stochastic_depth, unlabeled.stochastic_depth)
    for name, rate in models.skipped_branches(network).items():
        # Linear over the blocks, as timm made it.
        share = rate / most
        path = RowDropPath(RowRates(share * labeled.stochastic_depth, share * unlabeled.stochastic_depth, rows))
        network.set_submodule(name, path.train(network.training))
    if labeled.dropout or unlabeled.dropout:
        classifier = network.get_classifier()  # type: ignore[operator]
        if not isinstance(classifier, nn.Linear):
            found = type(classifier).__name__
            message = f"dropout of its own for pseudo-labeled images needs a network with a linear classifier, this one has {found}"
            raise RecipeError(message, pointer="/unlabeled_noise/dropout")
        classifier.register_forward_pre_hook(RowDropout(RowRates(labeled.dropout, unlabeled.dropout, rows)))
    return rows
