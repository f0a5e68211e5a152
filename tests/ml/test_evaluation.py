"""Figures of one generation and comparisons of two, on answers counted by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ml.errors import DataError
from ml.evaluation import compare, evaluate_logits, label_ranks, mcnemar_p_value, read_predictions, wilson_interval, write_predictions

CLASSES = ("cat", "dog", "owl")
LOGITS = np.array([[3, 1, 0], [0, 2, 1], [0, 1, 2], [2, 1, 0], [1, 1, 0]], np.float32)
LABELS = np.array([0, 1, 1, 2, 1])


def predictions(path: Path, correct: np.ndarray, labels: np.ndarray) -> Path:
    """A file of two-class answers that are right where `correct` says so."""
    answers = np.where(correct, labels, 1 - labels)
    logits = np.eye(2, dtype=np.float32)[answers] * 2
    keys = [f"{i:04d}.png" for i in range(len(labels))]
    write_predictions(path, keys, labels, logits, class_names=("no", "yes"), temperature=1.0)
    return path


def test_accuracy_confusions_and_classes_are_those_counted_by_hand() -> None:
    figures = evaluate_logits(LOGITS, LABELS, CLASSES)

    assert (figures["num_images"], figures["top1"], figures["top5"]) == (5, 0.4, 1.0)
    assert figures["confusion_matrix"] == [[1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert [row["accuracy"] for row in figures["per_class"]] == [1.0, pytest.approx(1 / 3), 0.0]
    assert figures["top_confusions"][0] == {"class_name": "dog", "predicted": "cat", "num_images": 1}


def test_a_tie_goes_to_the_smaller_index_in_rank_and_prediction_alike() -> None:
    ties = np.zeros((3, 3), np.float32)

    assert label_ranks(ties, np.array([0, 1, 2])).tolist() == [0, 1, 2]
    assert ties.argmax(-1).tolist() == [0, 0, 0]


def test_the_wilson_interval_is_the_published_one_and_stays_within_zero_and_one() -> None:
    # Wilson 1927 with z = 1.96: 81 of 263 (Newcombe 1998, table I).
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)


def test_the_temperature_moves_likelihood_but_never_accuracy() -> None:
    plain = evaluate_logits(LOGITS, LABELS, CLASSES)
    cooled = evaluate_logits(LOGITS, LABELS, CLASSES, temperature=2.0)

    assert cooled["top1"] == plain["top1"]
    assert cooled["nll_uncalibrated"] == plain["nll"]
    assert cooled["nll"] < plain["nll"]


def test_logits_that_are_no_numbers_are_not_counted_as_right() -> None:
    with pytest.raises(DataError, match="broken"):
        evaluate_logits(np.full((2, 3), np.nan, np.float32), np.array([0, 1]), CLASSES)


def test_predictions_come_back_sorted_by_key(tmp_path: Path) -> None:
    keys = ["b", "a", "d", "c", "e"]
    write_predictions(tmp_path / "p.parquet", keys, LABELS, LOGITS, class_names=CLASSES, temperature=1.0)

    found = read_predictions(tmp_path / "p.parquet")

    assert found["key"] == ["a", "b", "c", "d", "e"]
    assert found["label"].tolist() == [1, 0, 2, 1, 1]
    assert found["label_rank"].tolist() == [0, 0, 2, 1, 1]
    assert tuple(found["class_names"]) == CLASSES


def test_a_comparison_is_paired_and_its_interval_holds_the_difference(tmp_path: Path) -> None:
    labels = np.arange(400) % 2
    a = predictions(tmp_path / "a.parquet", np.arange(400) >= 80, labels)
    b = predictions(tmp_path / "b.parquet", np.arange(400) >= 20, labels)

    found = compare(a, b)

    low, high = found["top1"]["interval"]
    assert found["top1"]["difference"] == pytest.approx(0.15)
    # sqrt(0.15 x 0.85 / 400) = 0.0179; the unpaired interval would be half as wide again.
    assert (low, high) == (pytest.approx(0.115, abs=0.004), pytest.approx(0.185, abs=0.004))
    assert found["mcnemar"] == {"only_a_correct": 0, "only_b_correct": 60, "p_value": pytest.approx(2 * 0.5**60)}
    assert found["regressions"] == []
    assert found == compare(a, b)


def test_a_class_that_got_worse_is_named(tmp_path: Path) -> None:
    labels = np.arange(100) % 2
    a = predictions(tmp_path / "a.parquet", np.ones(100, bool), labels)
    b = predictions(tmp_path / "b.parquet", (labels == 0) | (np.arange(100) < 50), labels)

    [worse] = compare(a, b)["regressions"]

    assert (worse["class_name"], worse["difference"]) == ("yes", pytest.approx(-0.5))


def test_generations_measured_on_different_images_are_not_compared(tmp_path: Path) -> None:
    a = predictions(tmp_path / "a.parquet", np.ones(4, bool), np.array([0, 1, 0, 1]))
    b = predictions(tmp_path / "b.parquet", np.ones(4, bool), np.array([0, 1, 1, 1]))

    with pytest.raises(DataError, match="different images"):
        compare(a, b)


def test_mcnemars_p_is_the_exact_binomial_one() -> None:
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(1, 5) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar_p_value(300, 300) == 1.0
    assert 0 < mcnemar_p_value(20_000, 20_800) < 1e-4


def test_figures_and_comparisons_need_no_torch() -> None:
    code = "import sys, ml.evaluation, ml.calibration; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
