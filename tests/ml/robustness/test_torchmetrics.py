"""Accuracy, errors and calibration agree with torchmetrics, which others wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from ml import calibration, evaluation
from ml.calibration import softmax
from ml.robustness.metrics import top1_error

NUM_CLASSES = 7
CLASSES = tuple("abcdefg")


def build_logits(
    seed: int, sharpness: float
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float32]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, NUM_CLASSES, 500)
    logits = generator.normal(size=(500, NUM_CLASSES)).astype(np.float32)
    logits[np.arange(500), labels] += 1.5
    return (logits * sharpness).astype(np.float32), labels


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("num_bins", [10, 15])
def test_the_calibration_error_is_torchmetrics(sharpness: float, num_bins: int) -> None:
    logits, labels = build_logits(1, sharpness)
    probs = softmax(logits)

    ours = calibration.expected_calibration_error(probs.max(axis=-1), probs.argmax(axis=-1) == labels, num_bins)

    theirs = multiclass_calibration_error(torch.from_numpy(probs), torch.from_numpy(labels), NUM_CLASSES, n_bins=num_bins, norm="l1")
    assert ours == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize(("name", "top_k"), [("top1", 1), ("top5", 5)])
def test_accuracies_are_torchmetrics(name: str, top_k: int) -> None:
    logits, labels = build_logits(2, 1.0)

    ours = evaluation.evaluate_logits(logits, labels, CLASSES)[name]

    theirs = multiclass_accuracy(torch.from_numpy(logits), torch.from_numpy(labels), NUM_CLASSES, average="micro", top_k=top_k)
    assert ours == pytest.approx(float(theirs), abs=1e-7)


def test_the_error_under_corruption_is_1_minus_torchmetrics_accuracy() -> None:
    logits, labels = build_logits(3, 1.0)

    theirs = multiclass_accuracy(torch.from_numpy(logits), torch.from_numpy(labels), NUM_CLASSES, average="micro")
    assert top1_error(logits, labels) == pytest.approx(1 - float(theirs), abs=1e-7)
