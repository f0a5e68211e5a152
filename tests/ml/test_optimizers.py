"""The paper's optimizer, and the average, against their recurrences written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ml.config import OptimizerConfig
from ml.ema import EmaWeights
from ml.optimizers import build_optimizer, set_learning_rate
from ml.schedules import ema_decay_at

GRADIENTS = (0.5, -2.0, 3.0, 0.1, -0.7)
RATES = (0.1, 0.1, 0.05, 0.05, 0.01)


class OneWeight(nn.Module):
    """A weight matrix of one number, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))


def walk(config: OptimizerConfig) -> list[tuple[float, float]]:
    """Weight and bias after each of five updates with the fixed gradients and rates."""
    network = OneWeight()
    optimizer = build_optimizer(network, config)
    found = []
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        set_learning_rate(optimizer, rate)
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        found.append((network.weight.item(), network.bias.item()))
    return found


def test_rmsprop_follows_tensorflows_recurrence() -> None:
    config = OptimizerConfig(name="rmsprop_tf", momentum=0.9, weight_decay=1e-2)

    def recurrence(decay: float) -> list[float]:
        weight, square, momentum, path = 1.0, 1.0, 0.0, []
        for gradient, rate in zip(GRADIENTS, RATES, strict=True):
            slope = gradient + decay * weight
            square = 0.9 * square + 0.1 * slope**2
            # Epsilon inside the root, the rate inside the momentum: TensorFlow's form, not PyTorch's.
            momentum = 0.9 * momentum + rate * slope / math.sqrt(square + 1e-3)
            weight -= momentum
            path.append(weight)
        return path

    weights, biases = zip(*walk(config), strict=True)

    assert list(weights) == pytest.approx(recurrence(1e-2))
    assert list(biases) == pytest.approx(recurrence(0.0))


def test_sgd_is_nesterovs_with_decay_on_weights_alone() -> None:
    config = OptimizerConfig(name="sgd", momentum=0.9, nesterov=True, weight_decay=1e-2)

    def recurrence(decay: float) -> list[float]:
        weight, velocity, path = 1.0, 0.0, []
        for gradient, rate in zip(GRADIENTS, RATES, strict=True):
            slope = gradient + decay * weight
            velocity = 0.9 * velocity + slope
            weight -= rate * (slope + 0.9 * velocity)
            path.append(weight)
        return path

    weights, biases = zip(*walk(config), strict=True)

    assert list(weights) == pytest.approx(recurrence(1e-2))
    assert list(biases) == pytest.approx(recurrence(0.0))


def test_adamw_takes_the_rate_as_its_first_step_whatever_the_gradient() -> None:
    [(weight, bias), *_] = walk(OptimizerConfig(name="adamw", weight_decay=0.5))

    assert bias == pytest.approx(1 - 0.1)
    assert weight == pytest.approx(1 - 0.1 * 0.5 - 0.1)


def test_sgd_without_momentum_can_be_built_whatever_nesterov_says() -> None:
    [(weight, _), *_] = walk(OptimizerConfig(name="sgd", momentum=0.0, nesterov=True, weight_decay=0.0))

    assert weight == pytest.approx(1 - 0.1 * 0.5)


def test_the_average_follows_its_recurrence_in_weights_and_batch_norm() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    ema = EmaWeights(network)
    expected = {name: value.clone() for name, value in network.state_dict().items()}

    for step in range(5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(2, 3, 4, 4, dtype=torch.float64))
        decay = ema_decay_at(0.3, step)
        ema.update(decay)
        for name, value in network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()

    for name, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_an_average_that_is_off_equals_the_weights() -> None:
    network = nn.Linear(3, 3)
    ema = EmaWeights(network)
    with torch.no_grad():
        network.weight.normal_()

    ema.update(0.0)

    assert torch.equal(ema.network.weight, network.weight)  # type: ignore[arg-type]
