"""How gradients move weights: timm's parameter groups around SGD, AdamW and TensorFlow's RMSProp."""

from __future__ import annotations

import torch
from torch import nn

from ml.config import OptimizerConfig
from ml.models import undecayed_parameters

RMSPROP_DECAY = 0.9
RMSPROP_EPSILON = 1e-3
ADAMW_BETA2 = 0.999
ADAMW_EPSILON = 1e-8


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the parameters that are trained; the rate is set before each step.

    Weight decay spares biases and one-dimensional parameters. The official code decays biases too: a known departure.
    """
    # Here and not above, because ml.models must be the first to import timm.
    from timm.optim._param_groups import param_groups_weight_decay
    from timm.optim.rmsprop_tf import RMSpropTF

    groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=undecayed_parameters(network))
    rate = config.learning_rate
    if config.name == "sgd":
        # Nesterov's form needs a momentum; without one both are plain gradient descent.
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(config.momentum, ADAMW_BETA2), eps=config.epsilon or ADAMW_EPSILON)
    return RMSpropTF(groups, lr=rate, alpha=RMSPROP_DECAY, momentum=config.momentum, eps=config.epsilon or RMSPROP_EPSILON)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Make the next update use `rate` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
