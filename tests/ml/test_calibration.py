"""The temperature and the calibration error on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from ml.calibration import (
    PRIOR_DEVIATION,
    TEMPERATURE_RANGE,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
)


def calibrated(num_images: int, num_classes: int, *, too_sure: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `too_sure` times too large, with labels drawn from the probabilities before that."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(num_images, num_classes)) * 2
    cumulated = softmax(logits).cumsum(-1)
    labels = (generator.random((num_images, 1)) > cumulated).sum(-1).clip(max=num_classes - 1)
    return (logits * too_sure).astype(np.float32), labels


@pytest.mark.parametrize("too_sure", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_undoes_how_much_too_sure_the_logits_are(too_sure: float) -> None:
    logits, labels = calibrated(20_000, 5, too_sure=too_sure)

    assert fit_temperature(logits, labels) == pytest.approx(too_sure, rel=0.05)


@pytest.mark.parametrize("num_images", [5, 50, 500])
def test_no_other_temperature_is_more_probable(num_images: int) -> None:
    logits, labels = calibrated(num_images, 7, too_sure=2.2)

    def surprise(temperature: float) -> float:
        return num_images * negative_log_likelihood(logits, labels, temperature) + (np.log(temperature) / PRIOR_DEVIATION) ** 2 / 2

    assert surprise(fit_temperature(logits, labels)) <= min(map(surprise, np.geomspace(*TEMPERATURE_RANGE, 1000))) + 1e-9


def test_a_few_images_without_a_mistake_do_not_make_every_answer_certain() -> None:
    logits = np.eye(10, dtype=np.float32)[np.arange(40) % 10] * 4

    fitted = fit_temperature(logits, np.arange(40) % 10)

    assert 0.4 < fitted < 1.0
    assert softmax(logits, fitted).max() < 0.9999
    assert fit_temperature(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) == 1.0


def test_the_fitted_temperature_is_never_less_likely_than_none() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        logits, labels = generator.normal(size=(12, 3)) * 5, generator.integers(0, 3, 12)

        fitted = fit_temperature(logits, labels)

        assert negative_log_likelihood(logits, labels, fitted) <= negative_log_likelihood(logits, labels) + 1e-12


def test_calibration_error_is_the_weighted_distance_between_confidence_and_accuracy() -> None:
    confidences = np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])
    correct = np.array([True, True, True, False, False, False])

    assert expected_calibration_error(confidences, correct) == pytest.approx((4 * 0.15 + 2 * 0.5) / 6)
    assert [row["num_images"] for row in reliability(confidences, correct)] == [2, 4]


def test_a_confidence_on_the_edge_of_a_bin_belongs_to_the_lower_one() -> None:
    rows = reliability(np.array([0.2, 0.0, 1.0]), np.array([True, True, True]), num_bins=5)

    assert [(row["low"], row["num_images"]) for row in rows] == [(0.0, 2), (0.8, 1)]
