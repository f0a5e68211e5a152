"""Attacks stay within epsilon, hurt, say what they are, and are the same for an image in whatever batch it stands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ml.errors import DataError, RecipeError
from ml.pixels import Preprocessing
from ml.robustness.adversarial import EPSILONS, Attack, attack_all, fgsm, perturbed, pgd
from tests.ml.builders_images import build_pixels

PREPROCESSING = Preprocessing(
    size=16, crop_ratio=1.0, small_images=True, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
)
NUM_CLASSES = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches this small lose more time to waiting threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def build_images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pale pictures: their hues lie 30 levels apart, so that 16 make a difference."""
    images = np.stack([build_pixels(number, width=16, height=16, hue=number % NUM_CLASSES) for number in range(60)])
    return (images // 4 + 96).astype(np.uint8), np.arange(60) % NUM_CLASSES


@lru_cache(maxsize=1)
def build_network() -> nn.Module:
    """A tiny convolution with batch-norm that has learned the hues; in eval mode."""
    images, labels = build_images()
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, NUM_CLASSES))
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    inputs = normalized(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), torch.from_numpy(labels)).backward()
        optimizer.step()
    return network.eval()


def normalized(pixels_NCHW: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels_NCHW - mean) / std


def measure(*attacks: Attack, network: nn.Module | None = None, rows: int = 60, **options: Any) -> list[dict[str, Any]]:
    images, labels = build_images()
    fields = {"num_classes": NUM_CLASSES, "seed": 4} | options
    return attack_all(network or build_network(), images[:rows], labels[:rows], PREPROCESSING, attacks, **fields)


def build_batch(rows: int = 12) -> tuple[Tensor, Tensor]:
    images, labels = build_images()
    return torch.from_numpy(images[:rows]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels[:rows])


@pytest.mark.parametrize("attack", [fgsm(8 / 255), pgd(8 / 255), pgd(8 / 255, step_size=1.0), pgd(4 / 255, targeted=True)])
def test_pixels_stay_within_epsilon_and_within_0_to_1(attack: Attack) -> None:
    clean_NCHW, labels_N = build_batch()

    moved_NCHW = perturbed(build_network(), clean_NCHW, labels_N, PREPROCESSING, attack, num_classes=NUM_CLASSES, seed=0)

    assert (moved_NCHW - clean_NCHW).abs().max() <= attack.epsilon + 1e-6
    assert (moved_NCHW - clean_NCHW).abs().max() > attack.epsilon / 2
    assert moved_NCHW.min() >= 0
    assert moved_NCHW.max() <= 1


def test_fgsm_is_one_step_along_the_sign_of_the_gradient() -> None:
    clean_NCHW, labels_N = build_batch()
    variable = clean_NCHW.clone().requires_grad_()
    nn.functional.cross_entropy(build_network()(normalized(variable)), labels_N).backward()

    moved_NCHW = perturbed(build_network(), clean_NCHW, labels_N, PREPROCESSING, fgsm(2 / 255), num_classes=NUM_CLASSES, seed=0)

    assert variable.grad is not None
    torch.testing.assert_close(moved_NCHW, (clean_NCHW + 2 / 255 * variable.grad.sign()).clamp(0, 1))


def test_a_larger_epsilon_leaves_less_accuracy_and_more_loss() -> None:
    results = measure(*(fgsm(epsilon) for epsilon in EPSILONS))

    assert results[0]["clean_accuracy"] == 1.0
    assert results[-1]["accuracy"] < 1.0
    assert [result["accuracy"] for result in results] == sorted((result["accuracy"] for result in results), reverse=True)
    losses = [results[0]["clean_loss"], *(result["loss"] for result in results)]
    assert losses == sorted(losses)
    assert len(set(losses)) == 5


def test_pgd_hurts_at_least_as_much_as_fgsm() -> None:
    one_step, many = measure(fgsm(16 / 255), pgd(16 / 255))

    assert many["loss"] >= one_step["loss"] - 1e-6
    assert many["accuracy"] <= one_step["accuracy"]


def test_more_restarts_never_hurt_less() -> None:
    once, thrice = measure(pgd(8 / 255, num_steps=2), pgd(8 / 255, num_steps=2, num_restarts=3))

    assert thrice["accuracy"] <= once["accuracy"]
    assert thrice["loss"] >= once["loss"]


def test_an_epsilon_of_0_changes_nothing() -> None:
    [result] = measure(fgsm(0.0))

    assert (result["accuracy"], result["loss"]) == (result["clean_accuracy"], pytest.approx(result["clean_loss"]))


def test_a_targeted_attack_aims_at_wrong_classes_and_says_how_often_it_hit() -> None:
    clean, strong = measure(pgd(0.0, step_size=0.0, targeted=True), pgd(80 / 255, targeted=True))

    assert clean["hit_ratio"] == 0
    assert strong["hit_ratio"] > 0.5


def test_a_result_states_what_the_attack_was() -> None:
    [result] = measure(pgd(16 / 255, num_steps=4, step_size=0.01, num_restarts=2), seed=9)

    stated = {"name": "pgd", "epsilon": 16 / 255, "num_steps": 4, "step_size": 0.01, "num_restarts": 2, "random_start": True}
    assert result.items() >= (stated | {"targeted": False, "norm": "linf", "seed": 9, "num_images": 60}).items()
    assert "hit_ratio" not in result


def test_one_seed_gives_one_result_and_another_another() -> None:
    attack = pgd(8 / 255, num_steps=1, step_size=0.001)

    first, again, other = (measure(attack, seed=seed)[0]["loss"] for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_an_images_start_does_not_depend_on_its_batch() -> None:
    attacks = pgd(8 / 255), pgd(8 / 255, targeted=True)

    whole, pieces = measure(*attacks), measure(*attacks, batch_size=7)

    for one, other in zip(whole, pieces, strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_network_is_left_as_it_was() -> None:
    network = build_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    measure(pgd(8 / 255))

    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in network.parameters())
    assert not network.training


def test_a_network_in_train_mode_is_not_attacked() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, NUM_CLASSES)).train()

    with pytest.raises(ValueError, match="train mode"):
        measure(fgsm(0.1), network=network)


def test_images_without_labels_are_refused() -> None:
    images, labels = build_images()

    for few in (labels[:3], labels[:0]):
        with pytest.raises(DataError, match="images with a label each"):
            attack_all(build_network(), images[: len(few) and 5], few, PREPROCESSING, [fgsm(0.1)], num_classes=3, seed=0)


def test_a_targeted_attack_needs_two_classes() -> None:
    with pytest.raises(DataError, match="another class to aim at, this network knows 1"):
        measure(pgd(targeted=True), num_classes=1)


@pytest.mark.parametrize(
    ("field", "value"), [("epsilon", -0.1), ("epsilon", 1.5), ("num_steps", 0), ("num_restarts", 0), ("step_size", 2.0), ("name", "cw")]
)
def test_attacks_out_of_range_are_refused_by_field(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"name": "pgd", "epsilon": 0.1, "step_size": 0.01} | {field: value}

    with pytest.raises(RecipeError) as refused:
        Attack(**fields)

    assert refused.value.pointer == f"/{field}"
