"""Images that are packed while they are read: the same images elsewhere, or smaller ones."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ml import locations, pseudo_labels
from ml.errors import DataError
from ml.ingestion import Ingested, ingest, scan
from ml.locations import read_bytes
from ml.manifest import Manifest
from ml.packing import Packer, Packing
from ml.pixels import decode, pixel_digest
from ml.prediction import label
from ml.sources import open_source
from ml.sources.listing import Notes
from tests.ml import builders_images as images
from tests.ml import builders_sources as builders
from tests.ml.builders_generations import build_generation
from tests.ml.test_layouts import build_task


@pytest.fixture(autouse=True)
def _stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this process finds packed images."""
    monkeypatch.setattr(locations, "_stored_at", str(tmp_path / "stored"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = images.write_class_folders(tmp_path / "folder", {"cat": 7, "dog": 6})
    (folder / "cat" / "cut.jpg").write_bytes(images.truncated_jpeg())
    (folder / "dog" / "empty.png").write_bytes(b"")
    return folder


def pack(source: Path, out: Path, **fields: Any) -> tuple[Manifest, Ingested, list[Path]]:
    """The manifest and the shards, stored under their digests as the service does it."""
    packer = Packer(Packing(**fields), out / "shards", lambda digest: f"{digest[:2]}/{digest}")
    found = ingest(source, out / "manifest.parquet", kind="labeled", packer=packer)
    for shard in packer.shards:
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        stored = out / "stored" / digest[:2] / digest
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(shard.read_bytes())
    return Manifest.read(out / "manifest.parquet"), found, packer.shards


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet", "csv"])
def test_packed_images_are_the_same_dataset_and_are_read_from_their_shards(folder: Path, tmp_path: Path, layout: str) -> None:
    places = builders.write_layouts(folder, tmp_path)
    expected, told = scan(places[layout], kind="labeled")

    manifest, found, shards = pack(places[layout], tmp_path, shard_bytes=8_000)

    assert len(shards) > 2
    assert manifest.digest() == expected.digest()
    assert manifest.root == "stored:"
    assert [read_bytes(location) for location in manifest.locations()] == [(folder / key).read_bytes() for key in manifest.column("key")]
    assert found.report == told | {"packed": {"num_shards": len(shards), "num_bytes": sum(path.stat().st_size for path in shards)}}


def test_shards_are_whole_tars_that_others_can_read(folder: Path, tmp_path: Path) -> None:
    manifest, _, shards = pack(folder, tmp_path, shard_bytes=8_000)

    keys = [entry.key for entry in open_source(shards[0].parent, source_format="tar").entries("unlabeled", Notes())]

    assert sorted(keys) == manifest.column("key")


def test_the_same_images_make_the_same_shards(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()

    once, again = (pack(folder, out, shard_bytes=8_000)[2] for out in (tmp_path, tmp_path / "again"))

    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_pseudo_labels_of_packed_images_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    label(build_task(tmp_path, folder, output=str(tmp_path / "folder.parquet")))
    manifest, _, _ = pack(folder, tmp_path, shard_bytes=8_000)
    task = build_task(tmp_path, folder)
    manifest.unlabeled().write(task.unlabeled)

    summary = label(task)

    assert not summary["skipped"]
    assert pseudo_labels.read_shard(task.output).equals(pseudo_labels.read_shard(tmp_path / "folder.parquet"))


def test_what_cannot_be_read_is_a_row_without_a_place(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "list.csv").write_text("path,class\n00000.png,a\n00001.png,b\nnone.png,a\n")

    manifest, _, _ = pack(folder / "cat" / "list.csv", tmp_path)

    assert manifest.column("status") == ["ok", "ok", "missing"]
    assert [place is None for place in manifest.column("container")] == [False, False, True]


def picture(width: int, height: int, form: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, form, **({"exif": ROTATED} if form == "JPEG" else {}))
    return file.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A rotated JPEG, a PNG, a WebP that are larger than 64 pixels, and a PNG that is not."""
    folder = tmp_path / "large"
    for name, data in {
        "a/photo.jpg": picture(300, 150, "JPEG"),
        "a/drawing.png": picture(128, 256, "PNG"),
        "b/picture.webp": picture(200, 200, "WEBP"),
        "b/small.png": picture(64, 500, "PNG"),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_images_are_made_smaller_as_far_as_their_shorter_side_asks(large: Path, tmp_path: Path) -> None:
    manifest, found, _ = pack(large, tmp_path, resize_shorter_side=64)

    stored = [read_bytes(location) for location in manifest.locations()]
    sizes = dict(zip(manifest.column("key"), zip(manifest.column("width"), manifest.column("height"), strict=True), strict=True))

    assert sizes == {"a/drawing.png": (64, 128), "a/photo.jpg": (64, 128), "b/picture.webp": (64, 64), "b/small.png": (64, 500)}
    assert [Image.open(io.BytesIO(data)).format for data in stored] == ["PNG", "JPEG", "JPEG", "PNG"]
    assert stored[3] == (large / "b/small.png").read_bytes()
    # What the manifest says is true of what is stored.
    assert manifest.column("digest") == [hashlib.sha256(data).hexdigest() for data in stored]
    assert manifest.column("pixel_digest") == [pixel_digest(decode(data)) for data in stored]
    assert manifest.column("bytes") == [len(data) for data in stored]
    assert {name: found.report["packed"][name] for name in ("resize_shorter_side", "num_resized", "jpeg_quality")} == {
        "resize_shorter_side": 64,
        "num_resized": 3,
        "jpeg_quality": 95,
    }


def test_a_process_that_knows_no_stored_files_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _, _ = pack(folder, tmp_path)
    monkeypatch.setattr(locations, "_stored_at", None)

    with pytest.raises(DataError, match="packed by the service"):
        manifest.locations()
