"""Histograms that whoever labeled a shard wrote beside it: exact, and absent where they would be no saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ml.pseudo_labels
from ml.pseudo_labels import read_histogram
from tests.ml.test_selection import Pool, build_probs


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"min_confidence": 0.7, "cap_per_class": 40},
        {"cap_per_class": "none", "max_confidence": 0.9},
        {"sample_ratio": 0.5},
        {"evaluation": (3, 150)},
        {"evaluation": (), "keep": True},
    ],
    ids=str,
)
def test_what_the_labeler_counted_selects_the_rows_that_counting_them_selects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    # Few confidences, as in a shard of many images: then it pays to count them where they are labeled.
    probs = np.round(build_probs(400) * 6) / 6
    statuses = ["undecodable" if number % 50 == 7 else "ok" for number in range(400)]
    cuts, given = [0, 100, 200, 300, 400], dict(fields)
    ok = np.array([status == "ok" for status in statuses])
    pools = {}
    for name, share in (("counted", 4), ("uncounted", 10**9)):
        monkeypatch.setattr(ml.pseudo_labels, "_HISTOGRAM_SHARE", share)
        pools[name] = Pool(tmp_path / name, probs[ok], statuses=statuses, cuts=cuts)
    leaked = given.pop("evaluation", ())
    reports, selected = {}, {}
    for name, pool in pools.items():
        rows = [pool.rows[number] | {"key": f"e{number}", "class_name": "cat"} for number in leaked]
        evaluation = (pool.write_manifest("evaluation", rows, "evaluation"),) if rows else ()
        options = {key: value for key, value in given.items() if key != "keep"}
        selected[name] = pool.select(evaluation=evaluation, **options)
        if given.get("keep"):
            selected[name] = pool.select(output="again", keep_keys_of=str(pool.folder / "out"), **options)
        reports[name] = pool.report

    told = {name: sum(read_histogram(path) is not None for path in pool.shards) for name, pool in pools.items()}
    assert told == {"counted": 4, "uncounted": 0}
    assert selected["counted"] == selected["uncounted"]
    assert reports["counted"] == reports["uncounted"]
    assert selected["counted"]


def test_a_shard_of_few_images_tells_no_histogram_as_its_rows_are_as_short(tmp_path: Path) -> None:
    pool = Pool(tmp_path, build_probs(100))

    assert read_histogram(pool.shards[0]) is None


def test_a_histogram_counts_every_guess_by_class_and_confidence(tmp_path: Path) -> None:
    probs = np.round(build_probs(400) * 6) / 6
    pool = Pool(tmp_path, probs, cuts=[0, 200, 400])

    repeats = pool.select(cap_per_class="none", balance=False)
    classes, confidences, counts = read_histogram(pool.shards[0]) or (np.zeros(0), np.zeros(0), np.zeros(0))

    assert counts.sum() == 200
    assert len(counts) * 4 <= 200
    best = {int(k): float(confidences[classes == k].max()) for k in np.unique(classes)}
    assert best == {k: float(np.float16(probs[:200][probs[:200].argmax(1) == k].max())) for k in best}
    assert len(repeats) > 0
