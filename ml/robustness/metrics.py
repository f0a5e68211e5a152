"""Corruption errors, flips and top-5 distances, and their means against a baseline. numpy only.

Sources: Hendrycks and Dietterich 2019 (arXiv 1903.12261), sections 4.2 and 4.3, and hendrycks/robustness, ImageNet-P/test.py.
M clips of T frames, N images, K classes. Errors and probabilities are shares of 1; mCE, mFR and mT5D are 100 times a mean ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ml.calibration import Floats, Integers
from ml.errors import ClassMismatch, DataError
from ml.robustness.baselines import PERTURBATIONS, CorruptionErrors, Flips
from ml.robustness.severities import CORRUPTIONS, SEVERITIES

_TOP = 5


def top1_error(logits_NK: Floats, labels_N: Integers) -> float:
    """Share of images whose largest logit is not their label's; of equal logits the first class counts."""
    if len(labels_N) == 0:
        raise DataError("there is no image to measure an error on")
    return float((logits_NK.argmax(axis=-1) != labels_N).mean())


class CorruptionScore(NamedTuple):
    """What ImageNet-C says of a network, against a baseline."""

    mce: float
    """100 times the mean of `corruption_errors`; 100 is as bad as the baseline."""
    relative_mce: float | None
    """The same of what corruption *adds* to the error on clean images; None without a clean error of both."""
    mean_accuracy: float
    corruption_errors: dict[str, float]
    """Per corruption: errors summed over the severities, divided by the baseline's sum."""
    relative_corruption_errors: dict[str, float] | None
    baseline: str


def score_corruptions(measured: CorruptionErrors, baseline: CorruptionErrors) -> CorruptionScore:
    """Mean corruption error of `measured` over the 15 corruptions and 5 severities.

    Refused, and nothing computed, when a corruption or severity is missing on either side (DataError), when the two were measured
    on different images (DataError) or told different classes apart (ClassMismatch). Extra corruptions do not count.
    """
    _check_same(measured.data, measured.class_names, baseline.data, baseline.class_names, baseline.name, what="mCE")
    check_complete(measured.errors, of="the measured errors")
    check_complete(baseline.errors, of=f"the baseline {baseline.name!r}")
    ratios = {name: _sum(measured, name) / _positive(_sum(baseline, name), name, baseline.name) for name in CORRUPTIONS}
    relative = _relative(measured, baseline)
    return CorruptionScore(
        mce=100 * _mean(ratios.values()),
        relative_mce=None if relative is None else 100 * _mean(relative.values()),
        mean_accuracy=mean_accuracy(measured.errors),
        corruption_errors=ratios,
        relative_corruption_errors=relative,
        baseline=baseline.name,
    )


def mean_accuracy(errors: Mapping[str, Mapping[int, float]]) -> float:
    """1 minus the mean error over the 15 corruptions and 5 severities; needs no baseline."""
    check_complete(errors, of="the measured errors")
    return 1 - _mean(errors[name][severity] for name in CORRUPTIONS for severity in SEVERITIES)


def check_complete(errors: Mapping[str, Mapping[int, float]], *, of: str) -> None:
    """DataError, naming them, when corruptions or severities are missing among the 15 x 5."""
    missing = {
        name: [severity for severity in SEVERITIES if severity not in errors.get(name, {})]
        for name in CORRUPTIONS
        if any(severity not in errors.get(name, {}) for severity in SEVERITIES)
    }
    if missing:
        listed = "; ".join(
            name if len(severities) == len(SEVERITIES) else f"{name} at severity {', '.join(map(str, severities))}"
            for name, severities in missing.items()
        )
        raise DataError(f"{of} lack {listed}: without all 15 corruptions at all 5 severities there is no mean over them", missing=missing)


def _relative(measured: CorruptionErrors, baseline: CorruptionErrors) -> dict[str, float] | None:
    if measured.clean_error is None or baseline.clean_error is None:
        return None
    found = {}
    for name in CORRUPTIONS:
        added = _sum(baseline, name) - len(SEVERITIES) * baseline.clean_error
        if added <= 0:
            # A baseline that corruption does not hurt says nothing about the hurt of others.
            return None
        found[name] = (_sum(measured, name) - len(SEVERITIES) * measured.clean_error) / added
    return found


def _sum(errors: CorruptionErrors, corruption: str) -> float:
    return math.fsum(errors.errors[corruption][severity] for severity in SEVERITIES)


def flip_probability(predicted_MT: Integers, *, noise: bool) -> float:
    """Share of frames whose class is another than that of the frame before; for noise, another than that of the *first* frame.

    Each frame of noise is drawn anew, so two neighbors have nothing more in common than any two frames.
    """
    _check_frames(predicted_MT.shape[:2])
    earlier_MT = predicted_MT[:, :1] if noise else predicted_MT[:, :-1]
    return float((predicted_MT[:, 1:] != earlier_MT).mean())


def top5_distance(logits_MTK: Floats, *, noise: bool) -> float:
    """Mean distance of the five first classes of a frame to where the next frame ranks them; the pairs as in `flip_probability`.

    With s(i) the next frame's rank of the class that is i-th, the distance is the sum over i = 1..5 of |min(i-1, 5) - min(s(i)-1, 5)|,
    which is what the paper's double sum counts. Of equal logits the first class ranks first.
    """
    _check_frames(logits_MTK.shape[:2])
    top = min(_TOP, logits_MTK.shape[-1])
    order_MTK = np.argsort(-logits_MTK, axis=-1, kind="stable")
    ranks_MTK = np.argsort(order_MTK, axis=-1, kind="stable")
    earlier_MTI = (order_MTK[:, :1] if noise else order_MTK[:, :-1])[..., :top]
    later_MTK = ranks_MTK[:, 1:]
    shape = (*later_MTK.shape[:2], top)
    ranks_MTI = np.take_along_axis(later_MTK, np.broadcast_to(earlier_MTI, shape), axis=-1)
    return float(np.abs(np.arange(top) - np.minimum(ranks_MTI, _TOP)).sum(axis=-1).mean())


def _check_frames(shape: tuple[int, ...]) -> None:
    if shape[0] < 1 or shape[1] < 2:
        raise DataError(f"flips need at least one sequence of at least two frames, got {shape[0]} of {shape[1]}")


def is_noise(perturbation: str) -> bool:
    """Whether each frame is drawn anew."""
    return "noise" in perturbation


class FlipScore(NamedTuple):
    """What perturbation sequences say of a network, against a baseline."""

    mfr: float
    """100 times the mean of `flip_rates`."""
    mt5d: float | None
    """100 times the mean ratio of top-5 distances; None without distances of both."""
    flip_rates: dict[str, float]
    """Per perturbation: flip probability divided by the baseline's."""
    top5_rates: dict[str, float] | None
    baseline: str


def score_flips(measured: Flips, baseline: Flips, perturbations: Sequence[str] = PERTURBATIONS) -> FlipScore:
    """Mean flip rate over `perturbations`; refused like `score_corruptions`."""
    _check_same(measured.data, measured.class_names, baseline.data, baseline.class_names, baseline.name, what="mFR")
    for flips, of in ((measured, "the measured flips"), (baseline, f"the baseline {baseline.name!r}")):
        missing = [name for name in perturbations if name not in flips.flip_probabilities]
        if missing:
            raise DataError(f"{of} lack {', '.join(missing)}: there is no mFR over only some perturbations", missing=missing)
    rates = _ratios(measured.flip_probabilities, baseline.flip_probabilities, perturbations, baseline.name)
    distances = None
    if all(name in flips.top5_distances for name in perturbations for flips in (measured, baseline)):
        distances = _ratios(measured.top5_distances, baseline.top5_distances, perturbations, baseline.name)
    return FlipScore(
        mfr=100 * _mean(rates.values()),
        mt5d=None if distances is None else 100 * _mean(distances.values()),
        flip_rates=rates,
        top5_rates=distances,
        baseline=baseline.name,
    )


def _ratios(ours: Mapping[str, float], theirs: Mapping[str, float], names: Sequence[str], baseline: str) -> dict[str, float]:
    return {name: ours[name] / _positive(theirs[name], name, baseline) for name in names}


def _positive(value: float, name: str, baseline: str) -> float:
    if value > 0:
        return value
    raise DataError(f"the baseline {baseline!r} has {value} for {name}: nothing can be divided by it", name=name)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _check_same(
    data: str, classes: tuple[str, ...] | None, baseline_data: str, baseline_classes: tuple[str, ...] | None, name: str, *, what: str
) -> None:
    if data != baseline_data:
        raise DataError(
            f"the baseline {name!r} was measured on {baseline_data!r} and this network on {data!r}: no {what} across different images. "
            "Measure a generation on the same images and name it as the baseline",
            data=data,
            baseline_data=baseline_data,
        )
    if classes != baseline_classes:
        raise ClassMismatch(
            f"the baseline {name!r} tells {_list(baseline_classes)} apart and this network {_list(classes)}: no {what} across class lists",
            class_names=_listed(classes),
            baseline_class_names=_listed(baseline_classes),
        )


def _list(classes: tuple[str, ...] | None) -> str:
    if classes is None:
        return "the public data's own classes"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def _listed(classes: tuple[str, ...] | None) -> list[str] | None:
    return None if classes is None else list(classes)
