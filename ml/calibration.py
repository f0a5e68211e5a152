"""How much a probability can be believed: log-likelihood, calibration error, the temperature that repairs it. numpy only.

N images, K classes. Logits are divided by the temperature before the softmax: above 1 means the network was too sure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

TEMPERATURE_RANGE = (0.1, 10.0)
"""Where the temperature is looked for."""
PRIOR_DEVIATION = 0.5
"""Standard deviation of log T around 0 that is assumed before looking. It weighs as much as a handful of images: without it
forty validation images and no mistake would make every answer certain."""
NUM_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""


def log_softmax(logits_NK: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Log-probabilities in float64 of logits divided by the temperature."""
    scaled_NK = logits_NK.astype(np.float64) / temperature
    shifted_NK = scaled_NK - scaled_NK.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted_NK - np.log(np.exp(shifted_NK).sum(axis=-1, keepdims=True))
    return normalized


def softmax(logits_NK: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities in float64 of logits divided by the temperature."""
    return np.exp(log_softmax(logits_NK, temperature))


def negative_log_likelihood(logits_NK: Floats, labels_N: Integers, temperature: float = 1.0) -> float:
    """Mean of -log p(label), in nats."""
    return float(-log_softmax(logits_NK, temperature)[np.arange(len(labels_N)), labels_N].mean())


def fit_temperature(logits_NK: Floats, labels_N: Integers) -> float:
    """The most probable temperature in TEMPERATURE_RANGE, given the labels and that log T is near 0 (PRIOR_DEVIATION).

    Never less likely than 1 on these images, and 1 when there are none. In 1/T the mean negative log-likelihood is convex
    with derivative E_p[z] - z_label, so Newton's method inside a shrinking bracket finds the zero of the derivative.
    """
    if len(labels_N) == 0:
        return 1.0
    prior_weight = 1 / (len(labels_N) * PRIOR_DEVIATION**2)
    z_NK = logits_NK.astype(np.float64)
    z_NK -= z_NK.max(axis=-1, keepdims=True)
    z_label = float(z_NK[np.arange(len(labels_N)), labels_N].mean())
    low, high = 1 / TEMPERATURE_RANGE[1], 1 / TEMPERATURE_RANGE[0]
    inverse = 1.0
    for _ in range(100):
        slope, curvature = _derivatives(z_NK, z_label, inverse)
        slope += prior_weight * np.log(inverse) / inverse
        curvature += prior_weight * (1 - np.log(inverse)) / inverse**2
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - inverse) < 1e-10 * inverse:
            break
        inverse = following
    return float(np.clip(1 / inverse, *TEMPERATURE_RANGE))


def _derivatives(z_NK: NDArray[np.float64], z_label: float, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood in the inverse temperature."""
    probs_NK = softmax(z_NK, 1 / inverse)
    mean_N = (probs_NK * z_NK).sum(axis=-1)
    variance_N = (probs_NK * z_NK**2).sum(axis=-1) - mean_N**2
    return float(mean_N.mean()) - z_label, float(variance_N.mean())


def reliability(confidences_N: Floats, correct_N: NDArray[np.bool_], num_bins: int = NUM_BINS) -> list[dict[str, float]]:
    """The reliability diagram: per non-empty bin of confidence (low, high] its images, mean confidence and accuracy."""
    bins_N = np.clip(np.ceil(confidences_N * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    rows = []
    for index in np.unique(bins_N):
        inside_N = bins_N == index
        rows.append(
            {
                "low": index / num_bins,
                "high": (index + 1) / num_bins,
                "num_images": int(inside_N.sum()),
                "confidence": float(confidences_N[inside_N].mean()),
                "accuracy": float(correct_N[inside_N].mean()),
            }
        )
    return rows


def expected_calibration_error(confidences_N: Floats, correct_N: NDArray[np.bool_], num_bins: int = NUM_BINS) -> float:
    """Mean distance between confidence and accuracy over the bins, weighted with their images."""
    rows = reliability(confidences_N, correct_N, num_bins)
    return sum(row["num_images"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / max(1, len(confidences_N))
