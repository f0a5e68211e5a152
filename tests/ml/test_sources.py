"""Tar shards, Parquet files and lists as sources: what is wrong with them is said, and nothing leads out of them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import DataError, MlError, NoImages
from ml.ingestion import ingest, scan
from ml.manifest import Manifest
from ml.sources import open_source
from ml.sources.listing import Fingerprints, Notes
from ml.sources.roots import Folder
from ml.sources.tars import TarSource
from tests.ml import builders_images as images
from tests.ml import builders_sources as builders


def build_list(folder: Path, text: str, name: str = "list.csv") -> Path:
    images.write_image(folder / "a" / "1.png", 1)
    images.write_image(folder / "b" / "2.png", 2)
    (folder / name).write_text(text)
    return folder / name


def write_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def left_out(report: dict[str, Any]) -> dict[str, list[str]]:
    found = [warning for warning in report["warnings"] if warning["code"] == "ingestion.left_out"]
    return {warning["message"].partition(": ")[2]: warning["examples"] for warning in found}


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_a_class_may_stand_beside_the_image(tmp_path: Path, names: list[str] | None) -> None:
    classes = ["dog", "cat"] if names is None else ["1", "cat"]
    members = {}
    for number, name in enumerate(classes):
        members |= {f"{number}.png": images.image_bytes(number), f"{number}.cls": f"{name}\n".encode(), f"{number}.json": b"{}"}
    builders.write_tar(tmp_path / "x.tar", members)
    if names is not None:
        (tmp_path / "classes.txt").write_text("\n".join(names))

    manifest, report = scan(tmp_path, kind="labeled")

    assert dict(zip(manifest.column("key"), manifest.column("class_name"), strict=True)) == {"0.png": "dog", "1.png": "cat"}
    assert left_out(report) == {"they describe the image beside them": ["0.json", "1.json"]}


def test_what_a_tar_holds_besides_plain_files_is_left_out_and_said(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        builders.add_member(tar, "./a.png", images.image_bytes(1))
        builders.add_member(tar, "b.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        builders.add_member(tar, "c.png", type=tarfile.LNKTYPE, linkname="a.png")
        builders.add_member(tar, "/etc/d.png", images.image_bytes(2))
        builders.add_member(tar, "x/../../e.png", images.image_bytes(3))
        builders.add_member(tar, "f.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        builders.add_member(tar, "g.png", type=tarfile.FIFOTYPE)
        builders.add_member(tar, ".hidden.png", images.image_bytes(4))
        builders.add_member(tar, "inner.tar", builders.write_tar(tmp_path / "in" / "i.tar", {"h.png": b"h"}).read_bytes())
        builders.add_member(tar, "\udcff.png", images.image_bytes(5))

    manifest, report = scan(tmp_path / "x.tar", kind="unlabeled")

    assert dict(zip(manifest.column("key"), manifest.column("status"), strict=True)) == {"a.png": "ok", "inner.tar": "unsupported"}
    assert left_out(report) == {
        "they are links": ["b.png", "c.png"],
        "their names are absolute paths": ["/etc/d.png"],
        "their names lead out by `..`": ["x/../../e.png"],
        "they are devices, pipes or the like": ["f.png", "g.png"],
        "their names are not UTF-8": ["'\\udcff.png'"],
    }


@pytest.mark.parametrize("keep", [100, 512, 600, 2048, -1024, -10240])
def test_a_tar_that_is_cut_short_is_refused_with_the_last_whole_member(tmp_path: Path, keep: int) -> None:
    path = builders.write_tar(tmp_path / "x.tar", {"a.png": images.image_bytes(1), "b.png": images.image_bytes(2)})
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = whole[:keep] if keep > 0 else whole[: -(-end // 512) * 512 + (0 if keep == -10240 else keep)]
    path.write_bytes(cut)

    with pytest.raises(DataError) as caught:
        scan(path, kind="unlabeled")

    assert "x.tar" in str(caught.value)
    assert 0 <= caught.value.details["offset"] <= len(cut)
    if keep == -1024:
        assert "the last whole member is a.png" in str(caught.value)


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_in_a_tar_give_entries_or_a_data_error(
    changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = builders.write_tar(tmp_path_factory.mktemp("flipped") / "x.tar", {f"{n}.png": bytes([n]) * 700 for n in range(4)})
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    path.write_bytes(bytes(data))

    try:
        outcome = [entry.offset for entry in TarSource(Folder(path.parent), (path.name,)).entries("unlabeled", Notes())]
    except DataError as error:
        outcome = [error.details["offset"]]

    assert all(offset is not None and 0 <= offset <= len(data) for offset in outcome)


def test_a_key_in_two_shards_is_refused_with_both(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        builders.write_tar(tmp_path / name, {"1.png": images.image_bytes(1)})

    with pytest.raises(DataError, match=r"'1.png' in a.tar and b.tar"):
        scan(tmp_path, kind="unlabeled")


def test_fingerprints_tell_what_came_twice() -> None:
    prints = Fingerprints()
    for key in ("a", "b", "a", "c"):
        prints.add(key)

    assert prints.repeated() == {Fingerprints.of("a")}


def test_a_pattern_names_its_shards(tmp_path: Path) -> None:
    for number in range(12):
        builders.write_tar(tmp_path / f"s-{number:02d}.tar", {f"{number:02d}.png": images.image_bytes(number)})

    manifest, _ = scan(tmp_path / "s-{02..10}.tar", kind="unlabeled")

    assert manifest.column("key") == [f"{number:02d}.png" for number in range(2, 11)]
    with pytest.raises(NoImages, match=r"1 of 13 files are not there, for example s-12.tar"):
        scan(tmp_path / "s-{00..12}.tar", kind="unlabeled")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a/1.png\nb/2.png\n", "no header"),
        ("path,path\na/1.png,x\n", "no header"),
        ("path,class\na/1.png\n", "line 2 has 1 fields, the header has 2"),
        ('path,class\n"a/1.png,x\n', "line 2 is no CSV"),
        ("path,class\n/etc/passwd,x\n", "line 2: '/etc/passwd' cannot be listed: their names are absolute"),
        ("path,class\na/1.png,x\n../b.png,x\n", "line 3.*lead out"),
        ("path,class\ns3://bucket/b.png,x\n", "not fetched"),
        ("path,class\n,x\n", "line 2 names no image"),
        ("path,class\na/1.png,x\nb/2.png,y\na/1.png,y\n", "'a/1.png' in .* every image needs its own"),
        ("path,class,split\na/1.png,x,train\nb/2.png,y,test\n", "splits test, train; say which"),
        ("path,class\nlink/1.png,x\n", "lead out of"),
        ("path,class\n" + "x" * 200_000 + ",y\n", "is no CSV"),
    ],
)
def test_a_list_that_cannot_be_trusted_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "outside")
    path = build_list(tmp_path / "in", text)

    with pytest.raises(DataError, match=message):
        scan(path, kind="labeled")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a/1.png"}\n{"path"\n', "line 2 is no JSON"),
        ('["a/1.png"]\n', "line 1 is no JSON object"),
        ('{"class": "x"}\n', "line 1 names no image"),
        ('{"path": ["a/1.png"]}\n', "line 1: path is list"),
        ('{"path": "a/1.png", "class": 1.5}\n', "line 1: class is float"),
        ('{"path": "a/1.png", "class": "\\ud800"}\n', "no class name"),
        ('{"path": "\\ud800"}\n', "not UTF-8"),
        ("[" * 100_000 + "\n", "line 1 is no JSON"),
        ('{"path": "' + "x" * 1_100_000 + '"}\n', "line 1 is longer"),
        ('{"path": "a/1.png", "class": "emu"}\n', "class 'emu' is none of the 2 of classes.txt: a, b"),
        ('{"path": "a/1.png", "class": 2}\n', "class '2' is none"),
    ],
)
def test_a_line_that_cannot_be_a_row_is_refused_by_its_number(tmp_path: Path, text: str, message: str) -> None:
    path = build_list(tmp_path, text, "list.jsonl")
    (tmp_path / "classes.txt").write_text("a\nb\n")

    with pytest.raises(DataError, match=message):
        scan(path, kind="labeled")


def test_a_list_names_keys_paths_classes_and_splits(tmp_path: Path) -> None:
    rows = [
        {"key": "one", "path": "a/1.png", "class": 0, "split": "train"},
        {"key": "two", "path": "./b/2.png", "class": "b", "split": "train", "more": {"x": 1}},
        {"key": "gone", "path": "b/9.png", "class": "b", "split": "train"},
        {"key": "bare", "path": "b/2.png", "split": "train", "class": None},
        {"key": "four", "path": "b/2.png", "class": "b", "split": "test"},
    ]
    path = build_list(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "list.jsonl")
    (tmp_path / "classes.txt").write_text("a\nb\n")

    found = ingest(path, tmp_path / "manifest", kind="labeled", split="train")

    manifest = Manifest.read(tmp_path / "manifest")
    columns = [manifest.column(name) for name in ("key", "class_name", "status")]
    assert list(zip(*columns, strict=True)) == [("gone", "b", "missing"), ("one", "a", "ok"), ("two", "b", "ok")]
    assert left_out(found.report) == {"they have no class": ["bare"]}
    with pytest.raises(DataError, match="no split 'dev', only test, train"):
        ingest(path, tmp_path / "manifest", kind="labeled", split="dev")


def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = build_list(tmp_path, "path,class\n")
    path.write_bytes(b"path,class\na/1.png,\xff\n")

    with pytest.raises(DataError, match="not UTF-8"):
        scan(path, kind="labeled")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"]}, r"no column holds images among picture \(binary\); an `image` column"),
        ({"image": ["a.png"]}, r"no column holds images among image \(string\)"),
        ({"a": [{"bytes": b"x"}], "b": [{"bytes": b"x"}]}, "a, b could all be the images"),
        ({"image": [{"bytes": b"x"}]}, "no label among its columns image"),
        ({"image": [b"x"], "label": [1.5]}, "the column 'label' is double"),
    ],
)
def test_parquet_with_other_columns_is_refused_with_those_it_has(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_table(tmp_path / "x.parquet", **columns)

    with pytest.raises(DataError, match=message):
        scan(path, kind="labeled")


def test_parquet_labels_may_be_names_and_rows_without_one_are_left_out(tmp_path: Path) -> None:
    data = [images.image_bytes(number) for number in range(4)]
    path = write_table(tmp_path / "x.parquet", image=data, label=["a", "b", None, "b"])

    manifest, report = scan(path, kind="labeled")

    assert manifest.column("key") == ["x/000000000", "x/000000001", "x/000000003"]
    assert manifest.column("class_name") == ["a", "b", "b"]
    assert left_out(report) == {"they have no class": ["x/000000002"]}


def test_a_label_that_the_schema_does_not_name_is_refused(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"kind": {"names": ["a", "b"], "_type": "ClassLabel"}}}})}
    table = pa.table({"image": [b"x", b"y"], "kind": [0, 2]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "x.parquet")

    with pytest.raises(DataError, match="row 1: the label 2 is none of the 2 classes"):
        scan(tmp_path / "x.parquet", kind="labeled")


def test_paths_that_stand_twice_are_no_keys(tmp_path: Path) -> None:
    rows = [{"bytes": images.image_bytes(number), "path": "same.png"} for number in range(2)]
    path = write_table(tmp_path / "x.parquet", image=rows)

    assert scan(path, kind="unlabeled")[0].column("key") == ["x/000000000", "x/000000001"]


def test_splits_of_parquet_files_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, split in enumerate(("train", "test")):
        write_table(folder / f"{split}-00000-of-00001.parquet", image=[images.image_bytes(number)], key=[split])

    with pytest.raises(DataError, match="holds the splits test, train"):
        scan(folder, kind="unlabeled")
    assert ingest(folder, tmp_path / "manifest", kind="unlabeled", split="train").num_images == 1
    with pytest.raises(DataError, match="no split 'dev'"):
        open_source(folder, split="dev")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", image=[b"x"])
    path.write_bytes(path.read_bytes()[:-6])

    with pytest.raises(DataError, match="no whole Parquet file"):
        scan(path, kind="unlabeled")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_mixed(path: Path) -> None:
    path.mkdir()
    builders.write_tar(path / "a.tar", {})
    write_table(path / "a.parquet", image=[b"x"])


@pytest.mark.parametrize(
    ("name", "make", "options", "error"),
    [
        ("absent.tar", None, {}, NoImages),
        ("x.tar.gz", make_empty, {}, DataError),
        ("x.tar", make_empty, {}, DataError),
        ("x.tar", lambda path: path.write_bytes(b"\x1f\x8b" + bytes(2000)), {}, DataError),
        ("x.tar", lambda path: path.write_bytes(b"no tar at all" * 100), {}, DataError),
        ("x.pdf", make_empty, {}, DataError),
        ("both", make_mixed, {}, DataError),
        ("both", make_mixed, {"source_format": "jsonl"}, DataError),
        ("folder", Path.mkdir, {"source_format": "tar"}, NoImages),
        ("folder", Path.mkdir, {"split": "train"}, DataError),
        ("x.csv", make_empty, {"source_format": "folder"}, NoImages),
        ("x.dat", make_empty, {"source_format": "parquet"}, DataError),
        ("x-{0..9999999}.tar", None, {}, DataError),
        ("x-{3..1}.tar", None, {}, DataError),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object] | None, options: dict[str, Any], error: type[MlError]
) -> None:
    if make is not None:
        make(tmp_path / name)

    with pytest.raises(error):
        list(open_source(tmp_path / name, **options).entries("unlabeled", Notes()))


@pytest.mark.parametrize("name", ["", "link-{0..0}.tar"])
def test_shards_that_are_links_out_of_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    outside = builders.write_tar(tmp_path / "outside" / "x.tar", {"a.png": b"x"})
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "link-0.tar").symlink_to(outside)

    with pytest.raises(DataError, match="lead out of"):
        open_source(tmp_path / "tars" / name)
