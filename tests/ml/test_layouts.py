"""The same images in a folder, in tar shards, in Parquet and in lists are the same images, from keys to pseudo-labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ml import decoding, locations, manifest_files, pseudo_labels
from ml.config import ImageConfig, LabelingConfig, NoiseConfig, RuntimeConfig
from ml.data import TrainingBatches
from ml.errors import BadImage
from ml.ingestion import ingest, scan
from ml.locations import Location, read_bytes
from ml.manifest import Manifest, digest_of
from ml.prediction import label
from ml.sources import open_source
from ml.sources.listing import Notes
from ml.tasks import LabelingTask
from tests.ml import builders_images as images
from tests.ml import builders_sources as builders
from tests.ml.builders_generations import RUNTIME, build_generation
from tests.ml.builders_sources import LAYOUTS
from tests.ml.builders_training import build_plan


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class folders with a broken file, in every layout."""
    root = tmp_path_factory.mktemp("layouts")
    folder = images.write_class_folders(root / "folder", {"cat": 7, "dog": 6})
    (folder / "cat" / "cut.jpg").write_bytes(images.truncated_jpeg())
    (folder / "dog" / "notes.txt").write_bytes(b"hello")
    return builders.write_layouts(folder, root)


@pytest.mark.parametrize("kind", ["labeled", "unlabeled", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_has_the_same_keys_classes_and_digest_as_the_folder(layouts: dict[str, Path], layout: str, kind: Any) -> None:
    expected, told = scan(layouts["folder"], kind=kind)

    manifest, report = scan(layouts[layout], kind=kind)

    assert manifest.column("key") == expected.column("key") == builders.keys_below(layouts["folder"])
    assert manifest.table.select(["class_name", "status", "bytes"]).equals(expected.table.select(["class_name", "status", "bytes"]))
    assert manifest.digest() == expected.digest()
    assert report == told
    assert report["statuses"] == {"ok": 13, "undecodable": 1, "unsupported": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_read_back_from_where_it_lies(layouts: dict[str, Path], layout: str, tmp_path: Path) -> None:
    scan(layouts[layout], kind="labeled")[0].write(tmp_path / "manifest.parquet")

    manifest = Manifest.read(tmp_path / "manifest.parquet")

    assert [read_bytes(location) for location in manifest.locations()] == [
        (layouts["folder"] / key).read_bytes() for key in manifest.column("key")
    ]


@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=8), min_size=2, max_size=6, unique=True
    )
)
@settings(max_examples=12, deadline=None)
def test_keys_are_those_of_the_folder_whatever_the_names(names: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("names")
    for number, name in enumerate(names):
        images.write_image(root / "folder" / ("sub " if number % 2 else "") / f"{name}.png", number)
    tars = builders.write_tars(root / "folder", root / "tars", shards=2)
    parquet = builders.write_parquet(root / "folder", root / "parquet")

    expected = scan(root / "folder", kind="unlabeled")[0]

    assert expected.column("key") == builders.keys_below(root / "folder")
    assert scan(tars, kind="unlabeled")[0].digest() == expected.digest()
    assert scan(parquet, kind="unlabeled")[0].digest() == expected.digest()


def test_rows_that_come_in_no_order_are_put_in_order_a_few_groups_at_a_time(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.manifest.BATCH_ROWS", 2)
    monkeypatch.setattr(manifest_files, "_SLAB", 2)
    expected = scan(layouts["folder"], kind="labeled")[0]

    found = ingest(layouts["tar"], tmp_path / "manifest.parquet", kind="labeled")

    manifest = Manifest.read(tmp_path / "manifest.parquet")
    assert manifest.table.drop_columns(["container", "offset"]).equals(expected.table.drop_columns(["container", "offset"]))
    assert found.report["digest"] == manifest.digest() == digest_of(tmp_path / "manifest.parquet")
    assert pq.read_metadata(tmp_path / "manifest.parquet").num_row_groups == 8
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.parquet"]


def test_a_manifest_without_places_reads_as_one_of_a_folder(layouts: dict[str, Path], tmp_path: Path) -> None:
    manifest = scan(layouts["folder"], kind="labeled")[0]
    manifest.write(tmp_path / "new")
    table = pq.read_table(tmp_path / "new")
    pq.write_table(table.drop_columns(["container", "offset"]), tmp_path / "old")

    again = Manifest.read(tmp_path / "old")

    assert again.table.equals(manifest.table)
    assert again.locations() == manifest.locations()


def test_an_image_that_was_changed_or_has_gone_has_a_status(tmp_path: Path) -> None:
    members = {"a.png": images.image_bytes(1), "b.png": images.image_bytes(2)}
    tar = builders.write_tar(tmp_path / "x.tar", members)
    first, second = scan(tar, kind="unlabeled")[0].locations()
    assert read_bytes(first) == members["a.png"]
    data = bytearray(tar.read_bytes())
    assert first.offset is not None
    data[first.offset + 50] ^= 1
    tar.write_bytes(bytes(data))

    with pytest.raises(BadImage) as changed:
        read_bytes(first)
    assert read_bytes(second) == members["b.png"]
    tar.write_bytes(bytes(data[: first.offset + 10]))
    with pytest.raises(BadImage) as cut:
        read_bytes(second)
    tar.unlink()
    with pytest.raises(BadImage) as gone:
        read_bytes(second)

    assert [caught.value.status for caught in (changed, cut, gone)] == ["changed", "changed", "missing"]


def test_a_container_that_was_replaced_is_opened_anew(tmp_path: Path) -> None:
    old = scan(builders.write_tar(tmp_path / "x.tar", {"a.png": images.image_bytes(1)}), kind="unlabeled")[0].locations()[0]
    assert read_bytes(old) == images.image_bytes(1)
    builders.write_tar(tmp_path / "new.tar", {"b.png": images.image_bytes(2, width=40), "a.png": images.image_bytes(1)}).replace(
        tmp_path / "x.tar"
    )

    new = scan(tmp_path / "x.tar", kind="unlabeled")[0].locations()[0]

    assert read_bytes(new) == images.image_bytes(1)
    with pytest.raises(BadImage, match="something else"):
        read_bytes(old)


def test_many_shards_are_read_by_turns_with_few_of_them_open(tmp_path: Path) -> None:
    number = 2 * locations._OPEN_FILES
    for shard in range(number):
        builders.write_tar(tmp_path / f"{shard:04d}.tar", {f"{shard}-{place}.png": f"{shard}-{place}".encode() for place in range(2)})
    before = len(os.listdir("/proc/self/fd"))
    entries = list(open_source(tmp_path).entries("unlabeled", Notes()))

    for entry in sorted(entries, key=lambda entry: entry.key[::-1]):
        assert read_bytes(entry.location(str(tmp_path))).decode() == entry.key.removesuffix(".png")

    assert len(os.listdir("/proc/self/fd")) <= before + locations._OPEN_FILES


def test_a_file_of_another_length_is_changed(tmp_path: Path) -> None:
    path = images.write_image(tmp_path / "x.png", 1)
    location = scan(tmp_path, kind="unlabeled")[0].locations()[0]
    path.write_bytes(path.read_bytes() + b"more")

    with pytest.raises(BadImage) as caught:
        read_bytes(location)

    assert caught.value.status == "changed"


def test_parquet_rows_that_changed_or_have_no_bytes_have_a_status(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": images.image_bytes(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}, {"bytes": b"", "path": "c.png"}]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), path)
    manifest = scan(path, kind="unlabeled")[0]
    assert manifest.column("status") == ["ok", "missing", "empty"]
    [location] = manifest.usable().locations()

    for changed in ({"image": pa.array(rows[1:2] + rows[:1], kind)}, {"image": pa.array([], kind)}, {"other": pa.array([1])}):
        pq.write_table(pa.table(changed), path)
        with pytest.raises(BadImage) as caught:
            read_bytes(location)
        assert caught.value.status in ("missing" if changed.get("image") else "changed", "changed")
    path.unlink()
    with pytest.raises(BadImage) as gone:
        read_bytes(location)
    assert gone.value.status == "missing"


def build_task(folder: Path, source: Path, **fields: Any) -> LabelingTask:
    """Label everything in `source`."""
    scan(source, kind="unlabeled")[0].write(folder / "pool.parquet")
    values: dict[str, Any] = {
        "generation": str(folder / "generation"),
        "unlabeled": str(folder / "pool.parquet"),
        "start": 0,
        "stop": 10**6,
        "labeling": LabelingConfig(batch_size=4),
        "runtime": RUNTIME,
        "output": str(folder / "shard.parquet"),
    }
    return LabelingTask(**(values | fields))


def test_pseudo_labels_are_the_same_key_by_key(layouts: dict[str, Path], tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    label(build_task(tmp_path, layouts["folder"]))
    expected = pseudo_labels.read_shard(tmp_path / "shard.parquet")
    assert expected["status"].to_pylist().count("ok") == 13

    for layout in LAYOUTS[1:]:
        summary = label(build_task(tmp_path, layouts[layout], output=str(tmp_path / f"{layout}.parquet")))

        assert not summary["skipped"]
        assert pseudo_labels.read_shard(tmp_path / f"{layout}.parquet").equals(expected), layout
        # The shard of the one layout counts as done for the other.
        assert label(build_task(tmp_path, layouts[layout]))["skipped"]


def test_labels_of_images_that_went_away_are_rows_with_their_status(layouts: dict[str, Path], tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    tars = builders.write_tars(layouts["folder"], tmp_path / "tars")
    task = build_task(tmp_path, tars)
    (tars / "shard-001.tar").unlink()
    data = (tars / "shard-002.tar").read_bytes()
    (tars / "shard-002.tar").write_bytes(data.replace(b"IHDR", b"ihdr"))

    summary = label(task)

    assert summary["statuses"] == {"ok": 5, "missing": 4, "changed": 4, "undecodable": 1, "unsupported": 1}


@pytest.mark.parametrize(("small", "loaders"), [(True, 0), (False, 0), (False, 2)])
def test_training_sees_the_same_bits(layouts: dict[str, Path], small: bool, loaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.data._WORTH_A_WORKER_SECONDS", 0)
    seen = {}
    for layout in LAYOUTS if not loaders else ("folder", "tar", "parquet"):
        batches = TrainingBatches(
            labeled=scan(layouts[layout], kind="labeled")[0].usable(),
            class_names=("cat", "dog"),
            selected=None,
            unlabeled=None,
            image=ImageConfig(size=32, small_images=small),
            noise=NoiseConfig(),
            plan=build_plan(5, 8),
            seed=5,
            start_step=2,
            runtime=RuntimeConfig(device="cpu", num_threads=1, num_loader_workers=loaders),
        )
        with batches:
            seen[layout] = [(batch.images.clone(), batch.labels_B.clone()) for batch in batches]

    for layout, found in seen.items():
        for (images_A, labels_A), (images_B, labels_B) in zip(found, seen["folder"], strict=True):
            assert torch.equal(images_A, images_B), layout
            assert torch.equal(labels_A, labels_B), layout


def test_a_decoding_process_reads_containers_too(layouts: dict[str, Path]) -> None:
    small = ImageConfig(size=16, small_images=True)
    preprocessing = decoding.Preprocessing.from_config(small)
    decoders = decoding.Decoders(1)
    found = {}

    for layout in LAYOUTS:
        locations = scan(layouts[layout], kind="unlabeled")[0].locations()
        found[layout] = decoders.weak_views(locations, preprocessing)
    decoders.close()

    assert found["folder"].statuses.count("ok") == 13
    for views in found.values():
        assert views.statuses == found["folder"].statuses
        assert np.array_equal(views.images, found["folder"].images)


def test_a_location_says_where_it_is() -> None:
    assert [str(Location("/a/x.png")), str(Location("/a/x.tar", 512)), str(Location("/a/x.parquet", 3))] == [
        "/a/x.png",
        "/a/x.tar, byte 512",
        "/a/x.parquet, row 3",
    ]
