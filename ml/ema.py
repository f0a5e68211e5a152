"""The exponential moving average of the weights: what is evaluated, promoted, exported and used as the next teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EmaWeights:
    """A second network that follows the first one slowly and is never trained: always in eval mode."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        # Batch-norm's running statistics are averaged too, as the official code does; its counters are copied.
        self._averages: list[Tensor] = [average for average, _ in pairs if average.is_floating_point()]
        self._sources: list[Tensor] = [source for _, source in pairs if source.is_floating_point()]
        self._counters: list[Tensor] = [average for average, _ in pairs if not average.is_floating_point()]
        self._counted: list[Tensor] = [source for _, source in pairs if not source.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Make it decay x average + (1 - decay) x weights; at 0 it is the weights themselves."""
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counted)
