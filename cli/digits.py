"""scikit-learn's 1 797 real handwritten digits (8 × 8 gray values from 0 to 16) as folders of PNG files."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from core.errors import SetupError

NUM_CLASSES = 10
LABELED_PER_CLASS = 10
"""The preset `digits` learns from half of them and validates on the other half."""
TEST_PER_CLASS = 30


@dataclass(frozen=True, slots=True)
class DigitFolders:
    """Where the parts lie, and how many images each has."""

    labeled: Path
    unlabeled: Path
    test: Path
    num_labeled: int
    num_unlabeled: int
    num_test: int


def write_digits(
    root: Path, *, seed: int = 0, labeled_per_class: int = LABELED_PER_CLASS, test_per_class: int = TEST_PER_CLASS
) -> DigitFolders:
    """Cut the digits by the seed and write labeled/<digit>/*.png, test/<digit>/*.png and, flat, unlabeled/*.png below `root`.

    Equal arguments write equal bytes under equal names. A file's name is its place in scikit-learn's order, so the flat
    folder gives no class away. What lay in the three folders before is replaced.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SetupError(
            "the demo's digits come with scikit-learn, which is not installed: pip install 'noisy-student-server[demo]'"
        ) from error
    from PIL import Image

    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(seed).shuffle(order)
    left = {name: dict.fromkeys(range(NUM_CLASSES), count) for name, count in (("test", test_per_class), ("labeled", labeled_per_class))}
    counts = {"labeled": 0, "unlabeled": 0, "test": 0}
    for part in counts:
        shutil.rmtree(root / part, ignore_errors=True)
    for index in order:
        digit = int(digits.target[index])
        part = next((name for name, counter in left.items() if counter[digit] > 0), "unlabeled")
        folder = root / part
        if part != "unlabeled":
            left[part][digit] -= 1
            folder = folder / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        # 16 gray levels onto 0 … 255.
        pixels_HW = (digits.images[index] * (255 / 16)).round().astype("uint8")
        Image.fromarray(pixels_HW).save(folder / f"{index:04}.png", optimize=False)
        counts[part] += 1
    return DigitFolders(
        labeled=root / "labeled",
        unlabeled=root / "unlabeled",
        test=root / "test",
        num_labeled=counts["labeled"],
        num_unlabeled=counts["unlabeled"],
        num_test=counts["test"],
    )
