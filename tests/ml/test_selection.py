"""Selection keeps what it should, fills to the row, and does not depend on how the labels are cut into shards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.balance import select_rows
from ml.config import SelectionConfig
from ml.determinism import keyed_hashes
from ml.duplicates import find_duplicates
from ml.errors import ClassMismatch, DataError, Interrupted, NothingSelected, PoolTooSmall
from ml.manifest import Manifest
from ml.pseudo_labels import dense_probs, read_shard, write_shard
from ml.selection import SelectedLabels, select
from ml.tasks import SelectionTask
from tests.ml.test_manifest import build_row

NAMES = ("cat", "dog", "emu")


@dataclass
class Pool:
    """A pool of images with guesses, on disk."""

    folder: Path
    probs: Any
    statuses: list[str] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.statuses = self.statuses or ["ok"] * len(self.probs)
        self.keys = [f"{i:06d}.png" for i in range(len(self.statuses))]
        self.rows = [build_row(key, class_name=None, perceptual_hash=1000 + i) for i, key in enumerate(self.keys)]
        self.write_manifest("pool", self.rows, "unlabeled")
        self.shards = self.write_shards("shard", self.probs, self.cuts or [0, len(self.keys)])

    def write_manifest(self, name: str, rows: list[dict[str, Any]], kind: Any) -> str:
        path = self.folder / f"{name}.parquet"
        Manifest.from_rows(rows, root=self.folder, kind=kind).write(path)
        return str(path)

    def write_shards(self, name: str, probs: Any, cuts: list[int], stored: Any = "all") -> tuple[str, ...]:
        paths = []
        for start, stop in pairwise(cuts):
            path = self.folder / f"{name}-{start}-{stop}.parquet"
            ok = [status == "ok" for status in self.statuses]
            before = sum(ok[:start])
            of_shard = np.asarray(probs, dtype=np.float32)[before : before + sum(ok[start:stop])]
            write_shard(
                path,
                keys=self.keys[start:stop],
                statuses=self.statuses[start:stop],
                probs_MK=of_shard,
                class_names=NAMES,
                stored_probabilities=stored,
                facts={},
            )
            paths.append(str(path))
        return tuple(paths)

    def select(self, *, seed: int = 0, output: str = "out", **fields: Any) -> dict[str, Any]:
        task_fields = {name: fields.pop(name) for name in list(fields) if name in SelectionTask.__dataclass_fields__}
        defaults: dict[str, Any] = {"shards": self.shards, "unlabeled": str(self.folder / "pool.parquet"), "evaluation": ()}
        task = SelectionTask(
            **(defaults | task_fields),
            class_names=NAMES,
            selection=SelectionConfig(**({"require_every_class": False} | fields)),
            seed=seed,
            output=str(self.folder / output),
        )
        self.report = select(task)
        table = pq.read_table(self.folder / output)
        return dict(zip(table.column("key").to_pylist(), table.column("repeat").to_pylist(), strict=True))


def build_probs(num: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).dirichlet([0.6, 0.4, 0.2], num).astype(np.float32)


def sharp(classes: list[int], confidence: float = 0.9) -> Any:
    probs = np.full((len(classes), 3), (1 - confidence) / 2, dtype=np.float32)
    probs[np.arange(len(classes)), classes] = confidence
    return probs


def rows_per_class(pool: Pool, repeats: dict[str, int]) -> Counter[str]:
    classes = dict(zip(pool.keys, np.asarray(pool.probs).argmax(1), strict=True))
    counts: Counter[str] = Counter()
    for key, repeat in repeats.items():
        counts[NAMES[classes[key]]] += repeat
    return counts


def test_only_confident_guesses_are_kept_and_stored_with_their_labels(tmp_path: Path) -> None:
    pool = Pool(tmp_path, build_probs(200))

    repeats = pool.select(min_confidence=0.7, cap_per_class="none")

    best = np.asarray(pool.probs).max(1).astype(np.float16)
    assert list(repeats) == [key for key, value in zip(pool.keys, best, strict=True) if value >= np.float16(0.7)]
    assert set(repeats.values()) == {1}
    selected = SelectedLabels.read(tmp_path / "out")
    rows = [pool.keys.index(key) for key in repeats]
    np.testing.assert_allclose(selected.soft(np.arange(len(selected))), pool.probs[rows], atol=1e-3)
    assert selected.classes.tolist() == pool.probs[rows].argmax(1).tolist()
    assert selected.class_names == NAMES
    assert json.loads((tmp_path / "out.json").read_text()) == pool.report


def test_the_threshold_itself_is_kept(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 0, 1], 0.75))

    assert len(pool.select(min_confidence=0.75)) == 3
    with pytest.raises(NothingSelected):
        pool.select(min_confidence=0.76)


def test_an_interval_of_confidence_has_an_upper_end(tmp_path: Path) -> None:
    probs = np.concatenate([sharp([0, 1], 0.5), sharp([0, 1], 0.75), sharp([0, 1], 1.0)])
    pool = Pool(tmp_path, probs)

    assert list(pool.select(min_confidence=0.5, max_confidence=0.75)) == pool.keys[:2]
    assert list(pool.select(min_confidence=0.75, max_confidence=1.0)) == pool.keys[2:4]
    assert list(pool.select(min_confidence=0.75)) == pool.keys[2:]


@given(low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_a_higher_threshold_never_keeps_more(low: float, high: float, seed: int) -> None:
    low, high = sorted((low, high))
    probs = build_probs(300, seed)
    arrays = (probs.argmax(1), probs.max(1).astype(np.float16), keyed_hashes([str(i) for i in range(300)], seed))

    more, fewer = (
        set(select_rows(*arrays, SelectionConfig(min_confidence=value, cap_per_class="none"), "abc")[0].tolist()) for value in (low, high)
    )

    assert fewer <= more


@given(
    cuts=st.sets(st.integers(1, 119), max_size=6),
    order=st.randoms(use_true_random=False),
    cap=st.sampled_from([5, 13, 40, "largest-class", "none"]),
    ratio=st.sampled_from([1.0, 0.5]),
    stored=st.sampled_from(["all", 2]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_rows_however_the_labels_are_cut_and_ordered(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int], order: Any, cap: Any, ratio: float, stored: Any
) -> None:
    # Few different confidences, so that the hash must choose among equals.
    probs = np.round(build_probs(120) * 8) / 8
    pool = Pool(tmp_path_factory.mktemp("pool"), probs, statuses=["ok"] * 120)
    shards = list(pool.write_shards("cut", probs, [0, *sorted(cuts), 120], stored))
    order.shuffle(shards)
    options: dict[str, Any] = {"cap_per_class": cap, "sample_ratio": ratio, "min_confidence": 0.2, "seed": 3}

    whole = pool.select(**options)
    first = pool.report
    pieces = pool.select(**options, shards=tuple(shards), output="other")

    assert pieces == whole
    assert pool.report == first


@given(cap=st.integers(1, 60), max_repeat=st.sampled_from([1, 3, 1_000_000]), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_every_class_hits_the_target_exactly(cap: int, max_repeat: int, seed: int) -> None:
    probs = np.round(build_probs(100, seed) * 8) / 8
    classes, confidences = probs.argmax(1), probs.max(1).astype(np.float16)
    hashes = keyed_hashes([str(i) for i in range(100)], seed)
    config = SelectionConfig(min_confidence=0.3, cap_per_class=cap, max_repeat=max_repeat)

    rows, repeats = select_rows(classes, confidences, hashes, config, "abc", chunk_size=17)

    for k in range(3):
        available = int(((classes == k) & (confidences >= np.float16(0.3))).sum())
        of_class = repeats[classes[rows] == k]
        assert len(of_class) == min(available, cap)
        assert of_class.sum() == min(cap, len(of_class) * max_repeat)
        assert len(of_class) == 0 or of_class.max() - of_class.min() <= 1
        if available > cap:
            kept, dropped = set(rows[classes[rows] == k].tolist()), set(np.flatnonzero(classes == k).tolist())
            assert min(confidences[list(kept)]) >= max(confidences[list(dropped - kept)])


def test_largest_class_fills_the_others_up_and_cuts_nothing(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0] * 50 + [1] * 20 + [2] * 7))

    repeats = pool.select()

    assert rows_per_class(pool, repeats) == {"cat": 50, "dog": 50, "emu": 50}
    assert len(repeats) == 77
    assert pool.report["num_rows"] == 150
    assert [(row["num_unique"], row["num_rows"]) for row in pool.report["classes"]] == [(50, 50), (20, 50), (7, 50)]
    assert pool.report["histogram"]["counts"]["dog"][17:19] in ([0, 20], [20, 0])


def test_without_balance_every_image_stands_once(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0] * 50 + [1] * 20 + [2] * 7))

    assert rows_per_class(pool, pool.select(balance=False, cap_per_class=30)) == {"cat": 30, "dog": 20, "emu": 7}


def test_another_seed_repeats_other_images(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0] * 50 + [1] * 20))

    assert pool.select(seed=1) != pool.select(seed=2)
    assert pool.select(seed=1) == pool.select(seed=1)


def test_broken_images_are_never_selected(tmp_path: Path) -> None:
    statuses = ["ok", "undecodable", "ok", "missing"] * 10
    pool = Pool(tmp_path, sharp([0, 1] * 10), statuses=statuses, cuts=[0, 7, 40])

    assert list(pool.select()) == [key for key, status in zip(pool.keys, statuses, strict=True) if status == "ok"]
    assert (pool.report["num_pool"], pool.report["num_usable"]) == (40, 20)


def test_a_uniform_share_of_the_pool_is_looked_at(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1] * 1000))

    half = set(pool.select(sample_ratio=0.5, cap_per_class="none"))
    quarter = set(pool.select(sample_ratio=0.25, cap_per_class="none"))

    assert quarter < half
    assert 900 < len(half) < 1100


def test_images_that_evaluate_are_removed_from_the_pool(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1] * 10))
    twin = build_row("x/1.png", pixel_digest=pool.rows[3]["pixel_digest"], perceptual_hash=None)
    lookalike = build_row("x/2.png", perceptual_hash=pool.rows[5]["perceptual_hash"])
    cousin = build_row("x/3.png", perceptual_hash=pool.rows[8]["perceptual_hash"] ^ (1 << 40))
    evaluation = (pool.write_manifest("test", [twin, lookalike, cousin], "evaluation"),)

    def removed(distance: int | None) -> set[str]:
        kept = pool.select(evaluation=evaluation, near_duplicate_distance=distance, cap_per_class="none")
        return {key for key in pool.keys if key not in kept}

    assert removed(None) == {pool.keys[3]}
    assert removed(0) == {pool.keys[3], pool.keys[5]}
    assert pool.report["removed_duplicates"] == {"equal": 1, "near": 1, "examples": [pool.keys[3], pool.keys[5]]}
    assert {pool.keys[3], pool.keys[5], pool.keys[8]} <= removed(1)


def test_nothing_selected_ends_with_the_histogram_and_advice(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1, 2, 0], 0.6))

    with pytest.raises(NothingSelected, match=r"no image survives.*lower min_confidence from 0.9 to 0.6") as caught:
        pool.select(min_confidence=0.9)

    assert sum(caught.value.details["histogram"]["counts"]["cat"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_class_that_does_not_survive_is_named(tmp_path: Path) -> None:
    probs = np.concatenate([sharp([0, 1] * 5, 0.9), sharp([2], 0.4)])
    pool = Pool(tmp_path, probs)

    with pytest.raises(NothingSelected, match=r"no image of emu survives.*to 0.4 or less.*require_every_class off"):
        pool.select(min_confidence=0.5, require_every_class=True)
    with pytest.raises(NothingSelected, match="predicts none"):
        Pool(tmp_path / "b", sharp([0, 1])).select(require_every_class=True)
    assert rows_per_class(pool, pool.select(min_confidence=0.5)) == {"cat": 5, "dog": 5}


def test_a_cap_beyond_the_pool_is_refused(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1, 2]))

    with pytest.raises(PoolTooSmall, match="exceeds the 3 usable"):
        pool.select(cap_per_class=4)


def test_a_separate_model_chooses_and_the_teacher_labels(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0] * 10 + [1] * 10, 0.5))
    voter = pool.write_shards("voter", sharp([2] * 5 + [0] * 15, 0.95), [0, 13, 20])
    unsure = pool.write_shards("unsure", np.concatenate([sharp([0] * 5, 0.95), sharp([0] * 15, 0.4)]), [0, 20])

    repeats = pool.select(selection_shards=voter, min_confidence=0.9)
    few = pool.select(selection_shards=unsure, min_confidence=0.9)

    assert [repeats[key] for key in pool.keys] == [3] * 5 + [1] * 15
    assert list(few) == pool.keys[:5]
    np.testing.assert_allclose(SelectedLabels.read(tmp_path / "out").soft(np.array([4])), pool.probs[4:5], atol=1e-3)


def test_reassigning_keeps_keys_and_repeats_and_takes_the_new_labels(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0] * 12 + [1] * 5))
    first = pool.select(seed=1)
    relabeled = pool.write_shards("again", sharp([2] * 17, 0.4), [0, 4, 17])

    second = pool.select(output="second", shards=relabeled, keep_keys_of=str(tmp_path / "out"))

    assert second == first
    assert set(SelectedLabels.read(tmp_path / "second").classes.tolist()) == {2}


def test_shards_must_cover_the_pool_exactly_once(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1] * 10))
    halves = pool.write_shards("half", pool.probs, [0, 10, 20])
    overlapping = pool.write_shards("late", pool.probs, [5, 15])

    with pytest.raises(DataError, match="label 10 images, the pool has 20"):
        pool.select(shards=halves[:1])
    with pytest.raises(DataError, match="label the same images"):
        pool.select(shards=(halves[0], *overlapping))


def test_labels_of_other_classes_are_refused(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1]))
    write_shard(
        tmp_path / "x",
        keys=pool.keys,
        statuses=["ok", "ok"],
        probs_MK=sharp([0, 1])[:, :2],
        class_names=["cat", "dog"],
        stored_probabilities="all",
        facts={},
    )

    with pytest.raises(ClassMismatch):
        pool.select(shards=(str(tmp_path / "x"),))


def test_a_stopped_selection_leaves_nothing(tmp_path: Path) -> None:
    pool = Pool(tmp_path, sharp([0, 1]))
    task = SelectionTask(
        shards=pool.shards,
        unlabeled=str(tmp_path / "pool.parquet"),
        evaluation=(),
        class_names=NAMES,
        selection=SelectionConfig(),
        seed=0,
        output=str(tmp_path / "out"),
    )

    with pytest.raises(Interrupted):
        select(task, should_stop=lambda: True)

    assert not list(tmp_path.glob("*out*"))


def test_selected_probabilities_keep_the_form_they_were_stored_in(tmp_path: Path) -> None:
    pool = Pool(tmp_path, build_probs(20))
    pool.select(shards=pool.write_shards("top", pool.probs, [0, 9, 20], 2), min_confidence=0.1, cap_per_class="none")

    table = read_shard(tmp_path / "out")

    assert "probs" not in table.column_names
    np.testing.assert_allclose(dense_probs(table, 3), pool.probs, atol=2e-3)


def test_equal_hashes_still_hit_the_target() -> None:
    config = SelectionConfig(min_confidence=0.3, cap_per_class=4)
    classes, confidences = np.array([0] * 6 + [1] * 3), np.full(9, 0.5, dtype=np.float16)

    rows, repeats = select_rows(classes, confidences, np.zeros(9, np.uint64), config, "ab", chunk_size=2)

    assert rows.tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert repeats.tolist() == [1, 1, 1, 1, 2, 1, 1]


def test_the_search_for_duplicates_reports_rows(tmp_path: Path) -> None:
    path = Pool(tmp_path, build_probs(20)).folder / "pool.parquet"
    heard: list[int] = []

    find_duplicates(path, [Manifest.read(path)], 4, on_rows=heard.append)

    assert heard == [20]
