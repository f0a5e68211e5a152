"""How good a generation is, from its logits; and whether one is better than another. numpy only: the service compares too.

N images, K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml import calibration
from ml.calibration import Floats, Integers
from ml.errors import DataError
from ml.files import written_aside

_Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
_MAX_MATRIX_CLASSES = 200
"""With more classes the confusion matrix is left out; `top_confusions` says what matters of it."""


def evaluate_logits(logits_NK: Floats, labels_N: Integers, class_names: Sequence[str], *, temperature: float = 1.0) -> dict[str, Any]:
    """Every figure that a generation's record shows about one split; DataError without images or with logits that are no numbers.

    `nll`, `ece` and `reliability` are at `temperature`, the figures named uncalibrated at 1. A tie between logits goes
    to the smaller class index, here, in labeling and in serving alike.
    """
    num_images, num_classes = logits_NK.shape
    if num_images == 0:
        raise DataError("there is no readable image to evaluate on")
    if not np.isfinite(logits_NK).all():
        raise DataError("the logits are not all finite numbers: these weights are broken")
    ranks_N = label_ranks(logits_NK, labels_N)
    correct_N = ranks_N == 0
    predicted_N = logits_NK.argmax(axis=-1)
    matrix_KK = confusion_matrix(labels_N, predicted_N, num_classes)
    confidences_N = calibration.softmax(logits_NK, temperature).max(axis=-1)
    return {
        "num_images": num_images,
        "top1": float(correct_N.mean()),
        "top5": float((ranks_N < 5).mean()),
        "interval": list(wilson_interval(int(correct_N.sum()), num_images)),
        "nll": calibration.negative_log_likelihood(logits_NK, labels_N, temperature),
        "nll_uncalibrated": calibration.negative_log_likelihood(logits_NK, labels_N),
        "ece": calibration.expected_calibration_error(confidences_N, correct_N),
        "ece_uncalibrated": calibration.expected_calibration_error(calibration.softmax(logits_NK).max(axis=-1), correct_N),
        "reliability": calibration.reliability(confidences_N, correct_N),
        "per_class": _per_class(matrix_KK, class_names),
        "confusion_matrix": matrix_KK.tolist() if num_classes <= _MAX_MATRIX_CLASSES else None,
        "top_confusions": _top_confusions(matrix_KK, class_names),
    }


def label_ranks(logits_NK: Floats, labels_N: Integers) -> NDArray[np.int32]:
    """Place of each image's label among its logits: 0 when it is the prediction."""
    label_logits_N1 = np.take_along_axis(logits_NK, labels_N[:, None].astype(np.int64), axis=-1)
    earlier_NK = np.arange(logits_NK.shape[1])[None, :] < labels_N[:, None]
    ahead_NK = (logits_NK > label_logits_N1) | ((logits_NK == label_logits_N1) & earlier_NK)
    ranks_N: NDArray[np.int32] = ahead_NK.sum(axis=-1).astype(np.int32)
    return ranks_N


def confusion_matrix(labels_N: Integers, predicted_N: Integers, num_classes: int) -> NDArray[np.int64]:
    """Counts with the true class as the row and the predicted one as the column."""
    flat = np.bincount(labels_N.astype(np.int64) * num_classes + predicted_N, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """95 % interval of an accuracy; unlike the normal one it stays inside [0, 1] and is honest at 0 and at 1."""
    share = num_correct / num_images
    spread = _Z95**2 / num_images
    center = (share + spread / 2) / (1 + spread)
    half = _Z95 * math.sqrt(share * (1 - share) / num_images + spread / (4 * num_images)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def _per_class(matrix_KK: NDArray[np.int64], class_names: Sequence[str]) -> list[dict[str, Any]]:
    counts_K = matrix_KK.sum(axis=1)
    right_K = matrix_KK.diagonal()
    return [
        {"class_name": name, "num_images": int(count), "accuracy": float(right / count) if count else None}
        for name, count, right in zip(class_names, counts_K, right_K, strict=True)
    ]


def _top_confusions(matrix_KK: NDArray[np.int64], class_names: Sequence[str], limit: int = 20) -> list[dict[str, Any]]:
    """The most frequent mistakes, most frequent first."""
    mistakes_KK = matrix_KK - np.diag(matrix_KK.diagonal())
    order = np.argsort(-mistakes_KK, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(flat), len(class_names)) for flat in order]
    return [
        {"class_name": class_names[true], "predicted": class_names[guess], "num_images": int(mistakes_KK[true, guess])}
        for true, guess in pairs
        if mistakes_KK[true, guess]
    ]


def write_predictions(
    path: Path, keys: Sequence[str], labels_N: Integers, logits_NK: Floats, *, class_names: Sequence[str], temperature: float
) -> None:
    """Write one row per image, so that two generations can be compared pairwise later, without either of them.

    Columns: key, label and class (indices), confidence and label_probability (at `temperature`), label_rank. Rows lie sorted by key.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = sorted(range(len(keys)), key=keys.__getitem__)
    probs_NK = calibration.softmax(logits_NK, temperature)[order]
    labels = labels_N[order].astype(np.int32)
    table = pa.table(
        {
            "key": pa.array([keys[i] for i in order], pa.string()),
            "label": pa.array(labels),
            "class": pa.array(logits_NK[order].argmax(axis=-1).astype(np.int32)),
            "confidence": pa.array(probs_NK.max(axis=-1).astype(np.float32)),
            "label_probability": pa.array(probs_NK[np.arange(len(labels)), labels].astype(np.float32)),
            "label_rank": pa.array(label_ranks(logits_NK, labels_N)[order]),
        }
    ).replace_schema_metadata({"class_names": json.dumps(list(class_names))})
    with written_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_predictions(path: Path) -> dict[str, Any]:
    """The columns of `write_predictions` as numpy arrays, `key` as a list, and `class_names`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: table[name].to_pylist() if name == "key" else table[name].to_numpy() for name in table.column_names}
    return columns | {"class_names": json.loads((table.schema.metadata or {}).get(b"class_names", b"[]"))}


def compare(a_predictions: Path, b_predictions: Path, *, seed: int = 0, num_resamples: int = 10_000) -> dict[str, Any]:
    """Accuracy of B minus accuracy of A with its 95 % paired bootstrap interval, per-class differences and McNemar's test.

    Both files come from `write_predictions`; DataError when they are not about the same labeled images. Paired, because
    what the two have in common, easy and hard images, cancels.
    """
    a, b = read_predictions(a_predictions), read_predictions(b_predictions)
    if a["class_names"] != b["class_names"] or a["key"] != b["key"] or not np.array_equal(a["label"], b["label"]):
        shared = len(set(a["key"]) & set(b["key"]))
        raise DataError(
            f"the two generations were measured on different images ({len(a['key'])} and {len(b['key'])}, {shared} shared): "
            "evaluate both on one version of the evaluation set first",
            num_shared=shared,
        )
    correct_A, correct_B = a["label_rank"] == 0, b["label_rank"] == 0
    num_images = len(correct_A)
    only_a, only_b = int((correct_A & ~correct_B).sum()), int((~correct_A & correct_B).sum())
    low, high = _bootstrap_interval(only_a, only_b, num_images, seed, num_resamples)
    per_class = _class_differences(correct_A, correct_B, a["label"], a["class_names"])
    return {
        "num_images": num_images,
        "top1": {
            "a": float(correct_A.mean()),
            "b": float(correct_B.mean()),
            "difference": (only_b - only_a) / num_images,
            "interval": [low, high],
        },
        "nll": {"a": _nll(a), "b": _nll(b), "difference": _nll(b) - _nll(a)},
        "agreement": float((a["class"] == b["class"]).mean()),
        "mcnemar": {"only_a_correct": only_a, "only_b_correct": only_b, "p_value": mcnemar_p_value(only_a, only_b)},
        "per_class": per_class,
        "regressions": [row for row in per_class if row["difference"] is not None and row["difference"] < 0],
    }


def _nll(predictions: dict[str, Any]) -> float:
    """Mean -log p(label); a probability that fp32 rounded to 0 counts as fp32's smallest normal number."""
    return float(-np.log(np.maximum(predictions["label_probability"], np.finfo(np.float32).tiny)).mean())


def _bootstrap_interval(only_a: int, only_b: int, num_images: int, seed: int, num_resamples: int) -> tuple[float, float]:
    """2.5 % and 97.5 % points of the difference over resampled sets of images.

    An image's difference is -1, 0 or 1, so drawing N images with replacement is one draw from a multinomial.
    """
    shares = np.array([only_a, only_b, num_images - only_a - only_b]) / num_images
    draws = np.random.default_rng(seed).multinomial(num_images, shares, size=num_resamples)
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / num_images, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: how likely so lopsided a disagreement is between equally good generations."""
    total, fewer = only_a + only_b, min(only_a, only_b)
    if total == 0:
        return 1.0
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _class_differences(
    correct_A: NDArray[np.bool_], correct_B: NDArray[np.bool_], labels_N: NDArray[np.int32], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(class_names):
        inside_N = labels_N == index
        if not inside_N.any():
            rows.append({"class_name": name, "num_images": 0, "a": None, "b": None, "difference": None})
            continue
        a, b = float(correct_A[inside_N].mean()), float(correct_B[inside_N].mean())
        rows.append({"class_name": name, "num_images": int(inside_N.sum()), "a": a, "b": b, "difference": b - a})
    return rows
