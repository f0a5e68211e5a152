"""Labeled and pseudo-labeled images of one forward pass, each with its own dropout and stochastic depth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ml import models
from ml.config import ImageConfig, NetworkConfig, NoiseConfig
from ml.errors import RecipeError
from ml.model_noise import RowDropout, RowDropPath, RowRates, Rows, built_noise, differs, split_rows

CPU = torch.device("cpu")
QUIET = NoiseConfig(dropout=0.0, stochastic_depth=0.0)
NOISY = NoiseConfig(dropout=0.5, stochastic_depth=0.5)


def build(labeled: NoiseConfig, unlabeled: NoiseConfig, *, architecture: str = "resnet18") -> tuple[nn.Module, Rows]:
    """A network in training whose batch norm does not mix its rows."""
    torch.manual_seed(0)
    network = models.create_network(
        NetworkConfig(architecture=architecture),
        num_classes=4,
        noise=built_noise(labeled, unlabeled),
        image=ImageConfig(size=32, small_images=True),
    ).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return network, split_rows(network, labeled, unlabeled, CPU)


def look_twice(network: nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(images), network(images)


@pytest.mark.parametrize("quiet", ["labeled", "unlabeled"])
def test_noise_is_off_for_one_kind_of_image_and_on_for_the_other(quiet: str) -> None:
    network, rows = build(*((QUIET, NOISY) if quiet == "labeled" else (NOISY, QUIET)))
    rows.set(2, 1.0)

    first, second = look_twice(network)

    same = [torch.equal(one, other) for one, other in zip(first, second, strict=True)]
    assert same == [quiet == "labeled"] * 2 + [quiet == "unlabeled"] * 4


def test_faded_noise_is_none() -> None:
    network, rows = build(QUIET, NOISY)
    rows.set(2, 0.0)

    first, second = look_twice(network)

    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["dropout", "stochastic depth"])
def test_what_is_kept_makes_up_for_what_is_dropped(kind: str) -> None:
    rows = Rows()
    rows.set(5000, 0.5)
    rates = RowRates(0.4, 0.6, rows)
    layer = nn.Linear(8, 8).train()
    torch.manual_seed(2)

    ones = torch.ones(10_000, 8)
    [seen] = RowDropout(rates)(layer, (ones,)) if kind == "dropout" else [RowDropPath(rates).train()(ones)]

    # Labeled rows at 0.4, the others at half of 0.6.
    for part, rate in ((seen[:5000], 0.4), (seen[5000:], 0.3)):
        assert part.mean().item() == pytest.approx(1.0, abs=0.05)
        assert (part == 0).float().mean().item() == pytest.approx(rate, abs=0.03)
    whole_rows = (seen == seen[:, :1]).all().item()
    assert whole_rows == (kind == "stochastic depth")


def test_each_branch_keeps_its_place_between_none_and_the_last() -> None:
    network, _ = build(NoiseConfig(stochastic_depth=0.2), NoiseConfig(stochastic_depth=0.4))

    rates = [module.rates for module in network.modules() if isinstance(module, RowDropPath)]

    assert [rate.labeled for rate in rates] == pytest.approx([rate.unlabeled / 2 for rate in rates])
    assert rates[-1].unlabeled == pytest.approx(0.4)
    assert sorted(rate.unlabeled for rate in rates) == [rate.unlabeled for rate in rates]


def test_weights_keep_their_names_and_evaluation_is_undisturbed() -> None:
    network, rows = build(NOISY, QUIET)
    rows.set(3, 1.0)

    plain = models.create_network(NetworkConfig(architecture="resnet18"), num_classes=4, noise=QUIET, image=ImageConfig(size=32))
    plain.load_state_dict(network.state_dict())

    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), plain.eval()(images))


def test_one_rate_serves_where_both_kinds_have_it_to_the_end() -> None:
    assert not differs(NOISY, NOISY, 0.0)
    assert differs(NOISY, NOISY, 0.5)
    assert not differs(QUIET, QUIET, 0.5)
    assert differs(NOISY, QUIET, 0.0)


def test_a_network_without_a_linear_classifier_cannot_drop_features_row_by_row() -> None:
    with pytest.raises(RecipeError, match="needs a network with a linear classifier, this one has") as caught:
        build(NOISY, QUIET, architecture="resnetv2_50")

    assert caught.value.pointer == "/unlabeled_noise/dropout"
