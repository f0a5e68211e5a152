"""Losses against numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ml.losses import combine, labeled_cross_entropy, pseudo_label_cross_entropy, sharpen, soft_cross_entropy

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])


def by_hand(targets: torch.Tensor) -> float:
    """Mean over rows of -sum target x (logit - log sum exp), in float64."""
    total = 0.0
    for row, target in zip(LOGITS.double().tolist(), targets.double().tolist(), strict=True):
        log_sum = math.log(sum(map(math.exp, row)))
        total -= sum(t * (logit - log_sum) for t, logit in zip(target, row, strict=True))
    return total / len(LOGITS)


def test_soft_cross_entropy_is_the_mean_over_images_of_the_expected_surprise() -> None:
    assert soft_cross_entropy(LOGITS, PROBS).item() == pytest.approx(by_hand(PROBS), rel=1e-6)


def test_a_one_hot_row_gives_the_ordinary_cross_entropy() -> None:
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    assert soft_cross_entropy(LOGITS, one_hot).item() == pytest.approx(labeled_cross_entropy(LOGITS, torch.tensor([1, 2])).item())


def test_smoothing_spreads_its_share_evenly_over_all_classes() -> None:
    smoothed = torch.tensor([[1 - 0.1 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.1 / 3, 1 - 0.1 + 0.1 / 3]])

    assert labeled_cross_entropy(LOGITS, torch.tensor([0, 2]), smoothing=0.1).item() == pytest.approx(by_hand(smoothed), rel=1e-6)


def test_no_gradient_reaches_the_targets() -> None:
    targets = PROBS.clone().requires_grad_()
    logits = LOGITS.clone().requires_grad_()

    soft_cross_entropy(logits, targets).backward()

    assert targets.grad is None
    assert logits.grad is not None


def test_sharpening_raises_to_one_over_t_and_normalizes() -> None:
    expected = torch.tensor([[0.49, 0.04, 0.01], [0.0, 0.25, 0.25]])
    expected /= expected.sum(-1, keepdim=True)

    torch.testing.assert_close(sharpen(PROBS, 0.5), expected)
    assert sharpen(PROBS, 1.0) is PROBS


def test_a_tiny_temperature_ends_in_the_largest_class_not_in_zeros() -> None:
    probs = torch.full((1, 1000), 0.9 / 999)
    probs[0, 7] = 0.1

    sharp = sharpen(probs, 0.01)

    assert sharp[0, 7].item() == pytest.approx(1.0)
    assert sharp.sum().item() == pytest.approx(1.0)


def test_hard_pseudo_labels_are_smoothed_and_soft_ones_never_are() -> None:
    hard = pseudo_label_cross_entropy(LOGITS, PROBS, kind="hard", smoothing=0.1)
    soft = pseudo_label_cross_entropy(LOGITS, PROBS, kind="soft", smoothing=0.1)

    assert hard.item() == pytest.approx(labeled_cross_entropy(LOGITS, PROBS.argmax(-1), smoothing=0.1).item())
    assert soft.item() == pytest.approx(soft_cross_entropy(LOGITS, PROBS).item())


def test_the_three_combinations_are_those_of_algorithm_text_and_code() -> None:
    mean_L, mean_U = torch.tensor(2.0), torch.tensor(5.0)

    assert combine("sum", mean_L, mean_U, 3).item() == 7
    assert combine("ratio", mean_L, mean_U, 3).item() == 17
    assert combine("concat", mean_L, mean_U, 3).item() == 17 / 4


def test_concat_is_the_mean_over_the_concatenated_batch() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 4), torch.softmax(torch.randn(8, 4), -1)

    combined = combine("concat", soft_cross_entropy(logits[:2], targets[:2]), soft_cross_entropy(logits[2:], targets[2:]), 3)

    torch.testing.assert_close(combined, soft_cross_entropy(logits, targets))
