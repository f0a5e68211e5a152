"""Against whom robustness is measured: AlexNet on the public files, a recorded generation on everything else.

Published figures belong to the published images: an error on other images divided by AlexNet's on the public ones would mean
nothing, so a baseline knows its data and its classes, and `ml.robustness.metrics` refuses one that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml.robustness.severities import CORRUPTIONS, SEVERITIES

IMAGENET_C = "imagenet-c"
"""`data` of errors on the public ImageNet-C files."""
IMAGENET_P = "imagenet-p"
"""`data` of flips on the public ImageNet-P files."""
PERTURBATIONS = (
    *("gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "snow"),
    *("brightness", "translate", "rotate", "tilt", "scale"),
)
"""ImageNet-P's, in the order in which papers list them; CIFAR-10-P has spatter in place of snow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionErrors:
    """Top-1 errors of one network under corruptions, as shares of 1."""

    data: str
    """Which images: a public layout's name, or whatever identifies the user's own (a digest with seed and severities' table)."""
    class_names: tuple[str, ...] | None
    """What the network told apart, in its order; None for the public class list of `data`."""
    errors: Mapping[str, Mapping[int, float]]
    """Corruption → severity → error."""
    clean_error: float | None = None
    """The same network's error on the same images without corruption."""
    name: str = ""
    """Whose errors these are, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """How often a network changes its mind along perturbation sequences."""

    data: str
    class_names: tuple[str, ...] | None
    flip_probabilities: Mapping[str, float]
    """Perturbation → share of frames that are called something else than the frame they are compared with."""
    top5_distances: Mapping[str, float] = field(default_factory=dict)
    """Perturbation → mean top-5 distance."""
    name: str = ""


def _at_every_severity(means: Sequence[float]) -> dict[str, dict[int, float]]:
    """Only the means were published; for sums over the severities the mean at each of them is the same."""
    return {corruption: dict.fromkeys(SEVERITIES, mean) for corruption, mean in zip(CORRUPTIONS, means, strict=True)}


ALEXNET_C = CorruptionErrors(
    name="AlexNet on ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261)",
    data=IMAGENET_C,
    class_names=None,
    errors=_at_every_severity(
        (
            *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
            *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
        )
    ),
    # Torchvision's AlexNet; published to three digits, so a relative mCE against it is good to about one.
    clean_error=0.435,
)
ALEXNET_P = Flips(
    name="AlexNet on ImageNet-P; flip probabilities as others quote them, not read in their source",
    data=IMAGENET_P,
    class_names=None,
    flip_probabilities=dict(
        zip(PERTURBATIONS, (0.2365, 0.3006, 0.0930, 0.0594, 0.1193, 0.0489, 0.1101, 0.1310, 0.0705, 0.2353), strict=True)
    ),
)
"""No published top-5 distances of AlexNet were found: mT5D is always against a recorded generation."""


def errors_to_dict(errors: CorruptionErrors) -> dict[str, Any]:
    """JSON-able, to be stored with a generation's result and read back as a baseline."""
    return {
        "name": errors.name,
        "data": errors.data,
        "class_names": None if errors.class_names is None else list(errors.class_names),
        "errors": {corruption: {str(at): error for at, error in found.items()} for corruption, found in errors.errors.items()},
        "clean_error": errors.clean_error,
    }


def errors_from_dict(stored: Mapping[str, Any]) -> CorruptionErrors:
    """The inverse of `errors_to_dict`."""
    names = stored["class_names"]
    return CorruptionErrors(
        name=stored["name"],
        data=stored["data"],
        class_names=None if names is None else tuple(names),
        errors={corruption: {int(at): error for at, error in found.items()} for corruption, found in stored["errors"].items()},
        clean_error=stored["clean_error"],
    )


def flips_to_dict(flips: Flips) -> dict[str, Any]:
    """JSON-able, to be stored with a generation's result and read back as a baseline."""
    return {
        "name": flips.name,
        "data": flips.data,
        "class_names": None if flips.class_names is None else list(flips.class_names),
        "flip_probabilities": dict(flips.flip_probabilities),
        "top5_distances": dict(flips.top5_distances),
    }


def flips_from_dict(stored: Mapping[str, Any]) -> Flips:
    """The inverse of `flips_to_dict`."""
    names = stored["class_names"]
    return Flips(**{**stored, "class_names": None if names is None else tuple(names)})
