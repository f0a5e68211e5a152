"""Manifests keep their rows, their digest and their split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ml.manifest
from ml.errors import ClassMismatch, DataError, TooFewLabels
from ml.manifest import Manifest, split, split_validation


def build_row(key: str, **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": key,
        "digest": f"file-{key}",
        "pixel_digest": f"pixels-{key}",
        "perceptual_hash": 2**63 + 5,
        "class_name": key.split("/", maxsplit=1)[0] if "/" in key else None,
        "status": "ok",
        "bytes": 100,
        "width": 32,
        "height": 24,
    }
    return row | fields


def build_manifest(num_cats: int = 10, num_dogs: int = 20, **fields: Any) -> Manifest:
    keys = [f"cat/{i}.png" for i in range(num_cats)] + [f"dog/{i}.png" for i in range(num_dogs)]
    return Manifest.from_rows([build_row(key, **fields) for key in keys], root="/images", kind="labeled")


def test_a_written_manifest_reads_back_the_same(tmp_path: Path) -> None:
    manifest = build_manifest()

    manifest.write(tmp_path / "manifest.parquet")
    again = Manifest.read(tmp_path / "manifest.parquet")

    assert (again.root, again.kind, again.class_names) == ("/images", "labeled", ("cat", "dog"))
    assert again.table.equals(manifest.table)
    assert again.digest() == manifest.digest()


@pytest.mark.parametrize(("start", "stop"), [(0, 30), (3, 9), (8, 8), (7, 100), (29, 30), (30, 40)])
def test_rows_read_alone_are_those_of_the_whole(start: int, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ml.manifest, "BATCH_ROWS", 8)
    manifest = build_manifest()
    manifest.write(tmp_path / "manifest.parquet")

    part = Manifest.read(tmp_path / "manifest.parquet", start=start, stop=stop)

    assert part.table.equals(manifest.rows(start, stop).table)
    assert part.digest() == manifest.rows(start, stop).digest()


def test_equal_manifests_have_equal_bytes(tmp_path: Path) -> None:
    build_manifest().write(tmp_path / "a")
    build_manifest().write(tmp_path / "b")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_digest_ignores_the_root_and_sees_every_row() -> None:
    rows = [build_row("cat/1.png"), build_row("dog/1.png")]

    here = Manifest.from_rows(rows, root="/here", kind="labeled").digest()
    there = Manifest.from_rows(reversed(rows), root="/there", kind="labeled").digest()
    other = Manifest.from_rows([rows[0], build_row("dog/1.png", digest="another")], root="/here", kind="labeled").digest()

    assert here == there
    assert here != other


def test_keys_are_sorted_and_unique() -> None:
    assert build_manifest(2, 1).column("key") == ["cat/0.png", "cat/1.png", "dog/0.png"]

    with pytest.raises(DataError, match="stands twice"):
        Manifest.from_rows([build_row("a.png"), build_row("a.png")], root="/", kind="unlabeled")


def test_only_ok_rows_are_usable() -> None:
    broken = build_row("cat/x.png", status="undecodable", pixel_digest=None, perceptual_hash=None, width=None, height=None)
    manifest = Manifest.from_rows([build_row("cat/1.png"), broken], root="/r", kind="labeled")

    assert [location.path for location in manifest.usable().locations()] == ["/r/cat/1.png"]


def test_an_unknown_class_is_a_class_mismatch() -> None:
    assert build_manifest(1, 2).class_indices(["cat", "dog"]) == [0, 1, 1]

    with pytest.raises(ClassMismatch, match="dog"):
        build_manifest(1, 2).class_indices(["cat"])


def test_a_damaged_manifest_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    build_manifest().write(path)
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DataError, match="not a readable manifest"):
        Manifest.read(path)
    with pytest.raises(DataError, match="not a readable manifest"):
        Manifest.read(tmp_path / "absent")


@given(ratio=st.floats(0.01, 0.99), seed=st.integers(0, 2**63 - 1))
def test_a_validation_split_is_stratified_complete_and_repeatable(ratio: float, seed: int) -> None:
    manifest = build_manifest(10, 20)

    training, validation = split_validation(manifest, ratio, seed)

    assert sorted(training.column("key") + validation.column("key")) == manifest.column("key")
    for name, count in (("cat", 10), ("dog", 20)):
        num_validation = validation.column("class_name").count(name)
        assert 1 <= num_validation <= count - 1
        assert abs(num_validation - ratio * count) <= 1
    assert split_validation(manifest, ratio, seed)[1].column("key") == validation.column("key")


def test_another_seed_gives_another_split() -> None:
    manifest = build_manifest(50, 50)

    assert split_validation(manifest, 0.3, 1)[1].column("key") != split_validation(manifest, 0.3, 2)[1].column("key")


@given(seed=st.integers(0, 1000))
def test_equal_pixels_never_sit_on_both_sides(seed: int) -> None:
    rows = [build_row(f"{name}/{i}.png", pixel_digest=f"pixels-{i % 7}") for name in ("cat", "dog") for i in range(20)]
    manifest = Manifest.from_rows(rows, root="/r", kind="labeled")

    training, validation = split_validation(manifest, 0.3, seed)

    assert not set(training.column("pixel_digest")) & set(validation.column("pixel_digest"))
    assert len(training) + len(validation) == 40


def test_a_class_with_one_image_cannot_be_split() -> None:
    with pytest.raises(TooFewLabels, match="'cat' has 1 different usable images"):
        split_validation(build_manifest(1, 20), 0.2, 0)


def test_a_split_into_parts_leaves_the_rest_out() -> None:
    manifest = build_manifest(40, 40)

    parts = split(manifest, {"labeled": 0.1, "test": 0.2, "unlabeled": 0.5}, 3)

    assert {name: len(part) for name, part in parts.items()} == {"labeled": 8, "test": 16, "unlabeled": 40}
    keys = [key for part in parts.values() for key in part.column("key")]
    assert len(keys) == len(set(keys))


def test_shares_beyond_the_whole_are_refused() -> None:
    with pytest.raises(DataError, match="at most 1 together"):
        split(build_manifest(), {"a": 0.7, "b": 0.7}, 0)


def test_a_whole_number_is_images_per_class_and_rest_is_what_is_left() -> None:
    parts = split(build_manifest(10, 20), {"labeled": 4, "test": 0.25, "unlabeled": "rest"}, seed=0)

    counts = {part: [m.column("class_name").count(name) for name in ("cat", "dog")] for part, m in parts.items()}
    assert counts["labeled"] == [4, 4]
    assert sum(map(sum, counts.values())) == 30


def test_more_images_per_class_than_there_are_is_refused() -> None:
    with pytest.raises(TooFewLabels, match="asks for more"):
        split(build_manifest(10, 20), {"labeled": 11, "unlabeled": "rest"}, seed=0)


@pytest.mark.parametrize("shares", [{}, {"labeled": 0}, {"labeled": 1.5}, {"labeled": "all"}, {"test": "rest", "labeled": "rest"}])
def test_shares_that_mean_nothing_are_refused(shares: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        split(build_manifest(10, 20), shares, seed=0)
