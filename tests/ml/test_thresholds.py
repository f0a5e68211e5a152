"""Thresholds of single classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ml.errors import RecipeError
from tests.ml.test_selection import NAMES, Pool, build_probs


def test_a_class_with_a_threshold_of_its_own_keeps_what_it_lets_pass(tmp_path: Path) -> None:
    probs = build_probs(60)
    pool = Pool(tmp_path, probs, statuses=["ok"] * 60)
    classes, confidences = probs.argmax(1), probs.max(1).astype(np.float16)
    name = NAMES[1]

    kept = pool.select(min_confidence=0.8, min_confidence_of={name: 0.4}, cap_per_class="none", require_every_class=False)

    least = np.where(classes == 1, np.float16(0.4), np.float16(0.8))
    assert list(kept) == [key for key, confidence, low in zip(pool.keys, confidences, least, strict=True) if confidence >= low]
    assert any(confidence < 0.8 for confidence in confidences[np.isin(pool.keys, list(kept))])


def test_a_threshold_of_a_class_that_there_is_not_is_refused_with_the_nearest(tmp_path: Path) -> None:
    pool = Pool(tmp_path, build_probs(20))

    with pytest.raises(RecipeError, match="names 'cats', which is no class of the labels; did you mean 'cat'"):
        pool.select(min_confidence_of={"cats": 0.2})
