"""Folders become manifests; what is wrong with them is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ml.errors import DataError, Interrupted, NoImages, TooFewLabels
from ml.events import Event
from ml.ingestion import find_leakage, scan, split_folder
from ml.pixels import decode, pixel_digest
from tests.ml import builders_images as builders


def build_labeled(root: Path, **counts: int) -> Path:
    return builders.write_class_folders(root, counts or {"cat": 3, "dog": 4})


def test_class_folders_become_rows_with_classes(tmp_path: Path) -> None:
    build_labeled(tmp_path)

    manifest, report = scan(tmp_path, kind="labeled")

    assert manifest.class_names == ("cat", "dog")
    assert manifest.column("class_name") == ["cat"] * 3 + ["dog"] * 4
    assert report["classes"] == {"cat": 3, "dog": 4}
    assert report["statuses"] == {"ok": 7}
    assert report["warnings"] == []
    first = Path(manifest.locations()[0].path)
    assert manifest.column("pixel_digest")[0] == pixel_digest(decode(first.read_bytes()))
    assert manifest.column("bytes")[0] == first.stat().st_size
    assert (manifest.column("width")[0], manifest.column("height")[0]) == (32, 32)


def test_a_folder_above_the_parts_is_no_folder_of_classes(tmp_path: Path) -> None:
    build_labeled(tmp_path, train=3, test=3)

    with pytest.raises(DataError, match=r"the classes of .* would be test and train: .* give one of them"):
        scan(tmp_path, kind="labeled")


def test_images_below_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    build_labeled(tmp_path)
    builders.write_image(tmp_path / "cat" / "2024" / "x.png", 77)

    manifest, _ = scan(tmp_path, kind="labeled")

    assert manifest.column("class_name")[manifest.column("key").index("cat/2024/x.png")] == "cat"


def test_a_pool_may_be_flat_or_nested_and_has_no_classes(tmp_path: Path) -> None:
    builders.write_flat_folder(tmp_path, 3)
    builders.write_image(tmp_path / "a" / "b" / "x.jpg", 1)

    manifest, report = scan(tmp_path, kind="unlabeled")

    assert len(manifest) == 4
    assert manifest.class_names == ()
    assert set(manifest.column("class_name")) == {None}
    assert report["classes"] == {}


def test_every_file_gets_a_row_and_a_status(tmp_path: Path) -> None:
    builders.write_flat_folder(tmp_path, 2)
    files = {
        "empty.jpg": b"",
        "notes.txt": b"hello",
        "cut.jpg": builders.truncated_jpeg(),
        "moving.gif": builders.gif(),
        "bomb.png": builders.huge_header_png(),
        ".DS_Store": b"x",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")

    manifest, report = scan(tmp_path, kind="unlabeled")

    status = dict(zip(manifest.column("key"), manifest.column("status"), strict=True))
    assert {key: value for key, value in status.items() if value != "ok"} == {
        "empty.jpg": "empty",
        "notes.txt": "unsupported",
        "cut.jpg": "undecodable",
        "moving.gif": "unsupported",
        "bomb.png": "too_large",
        "gone.png": "missing",
        "pipe.png": "unsupported",
    }
    assert report["statuses"]["ok"] == 2
    assert report["examples"]["unsupported"] == ["moving.gif", "notes.txt", "pipe.png"]
    assert json.loads(json.dumps(report)) == report


def test_the_report_counts_duplicates_and_contradictions(tmp_path: Path) -> None:
    build_labeled(tmp_path)
    picture = builders.build_image(50)
    (tmp_path / "cat" / "p.png").write_bytes(builders.encode(picture, "PNG"))
    (tmp_path / "cat" / "q.png").write_bytes(builders.encode(picture, "PNG"))
    (tmp_path / "dog" / "p.bmp").write_bytes(builders.encode(picture, "BMP"))
    picture.putpixel((0, 0), (picture.tobytes()[0] ^ 1, *picture.tobytes()[1:3]))
    (tmp_path / "dog" / "r.png").write_bytes(builders.encode(picture, "PNG"))

    _, report = scan(tmp_path, kind="labeled")

    assert report["duplicate_files"]["num_extra"] == 1
    assert report["duplicate_pixels"]["examples"] == [["cat/p.png", "cat/q.png", "dog/p.bmp"]]
    assert report["near_duplicates"]["examples"] == [["cat/p.png", "dog/r.png"]]
    assert [warning["code"] for warning in report["warnings"]] == ["ingestion.contradicting_labels", "ingestion.duplicates"]


@pytest.mark.parametrize("kind", ["labeled", "unlabeled", "evaluation"])
def test_a_missing_or_empty_folder_has_no_images(tmp_path: Path, kind: str) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(NoImages):
            scan(folder, kind=kind)  # type: ignore[arg-type]


def test_a_flat_folder_is_not_labeled(tmp_path: Path) -> None:
    builders.write_flat_folder(tmp_path, 3)

    with pytest.raises(NoImages, match="no class folders"):
        scan(tmp_path, kind="labeled")


def test_a_class_folder_without_usable_images_is_refused(tmp_path: Path) -> None:
    build_labeled(tmp_path)
    (tmp_path / "emu").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "x.jpg").write_bytes(b"")

    with pytest.raises(NoImages, match="without a usable image: emu, fox"):
        scan(tmp_path, kind="labeled")


def test_one_class_alone_is_refused_for_labels_only(tmp_path: Path) -> None:
    build_labeled(tmp_path, cat=3)

    with pytest.raises(TooFewLabels, match="one class only"):
        scan(tmp_path, kind="labeled")
    assert scan(tmp_path, kind="evaluation")[0].class_names == ("cat",)


def test_a_class_with_one_image_is_a_warning(tmp_path: Path) -> None:
    build_labeled(tmp_path, cat=1, dog=3)

    _, report = scan(tmp_path, kind="labeled")

    assert [(warning["code"], warning["examples"]) for warning in report["warnings"]] == [("ingestion.single_image_class", ["cat"])]


def test_files_beside_the_class_folders_are_left_out_with_a_warning(tmp_path: Path) -> None:
    build_labeled(tmp_path)
    builders.write_image(tmp_path / "stray.png", 1)

    manifest, report = scan(tmp_path, kind="labeled")

    assert len(manifest) == 7
    assert report["warnings"][0]["examples"] == ["stray.png"]


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    outside = builders.write_image(tmp_path / "outside" / "x.png", 1)
    root = build_labeled(tmp_path / "root")
    (root / "cat" / "inside.png").symlink_to(root / "dog" / "00003.png")
    assert len(scan(root, kind="labeled")[0]) == 8
    (root / "cat" / "link.png").symlink_to(outside)
    (root / "egg").symlink_to(outside.parent)

    with pytest.raises(DataError, match="lead out") as caught:
        scan(root, kind="labeled")

    assert caught.value.details["keys"] == ["cat/link.png", "egg"]


def test_a_linked_folder_that_contains_itself_ends(tmp_path: Path) -> None:
    build_labeled(tmp_path)
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat")

    manifest, report = scan(tmp_path, kind="labeled")

    assert len(manifest) == 7
    assert report["warnings"][0]["examples"] == ["cat/loop"]


def test_a_name_that_is_not_utf8_is_left_out_with_a_warning(tmp_path: Path) -> None:
    builders.write_flat_folder(tmp_path, 2)
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).write_bytes(builders.image_bytes())

    manifest, report = scan(tmp_path, kind="unlabeled")

    assert len(manifest) == 2
    assert "not UTF-8" in report["warnings"][0]["message"]


def test_scanning_reports_progress_and_stops_when_asked(tmp_path: Path) -> None:
    builders.write_flat_folder(tmp_path, 3)
    events: list[Event] = []

    scan(tmp_path, kind="unlabeled", on_event=events.append)

    assert [event.kind for event in events] == ["stage", "progress"]
    assert (events[1].data["done"], events[1].data["total"]) == (3, 3)
    with pytest.raises(Interrupted):
        scan(tmp_path, kind="unlabeled", should_stop=lambda: True)


def test_leakage_is_found_by_file_and_by_pixels(tmp_path: Path) -> None:
    test_root = build_labeled(tmp_path / "test")
    pool_root = builders.write_flat_folder(tmp_path / "pool", 5)
    (pool_root / "copy.png").write_bytes((test_root / "cat" / "00000.png").read_bytes())
    (pool_root / "again.bmp").write_bytes(builders.encode(decode((test_root / "dog" / "00003.png").read_bytes()), "BMP"))
    evaluation, _ = scan(test_root, kind="evaluation")
    pool, _ = scan(pool_root, kind="unlabeled")

    findings = find_leakage([evaluation], [pool])

    assert findings == [
        {"key": "dog/00003.png", "evaluation": 0, "other_key": "again.bmp", "other": 0, "by": "pixels"},
        {"key": "cat/00000.png", "evaluation": 0, "other_key": "copy.png", "other": 0, "by": "file"},
    ]
    assert find_leakage([evaluation], [pool.usable().take([0, 1, 2])]) == []


def test_two_empty_files_are_no_leakage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        builders.write_flat_folder(tmp_path / name, 2, first=10 if name == "a" else 20)
        (tmp_path / name / "empty.png").write_bytes(b"")

    manifests = [scan(tmp_path / name, kind="unlabeled")[0] for name in ("a", "b")]

    assert find_leakage(manifests[:1], manifests[1:]) == []


def test_a_folder_splits_into_parts_that_do_not_leak(tmp_path: Path) -> None:
    root = builders.write_class_folders(tmp_path, {"cat": 20, "dog": 20}, size=8)
    manifest, _ = scan(root, kind="labeled")

    parts = split_folder(manifest, {"labeled": 0.2, "unlabeled": 0.4, "test": 0.4}, seed=5)

    assert {name: (part.kind, len(part)) for name, part in parts.items()} == {
        "labeled": ("labeled", 8),
        "unlabeled": ("unlabeled", 16),
        "test": ("evaluation", 16),
    }
    assert set(parts["unlabeled"].column("class_name")) == {None}
    assert find_leakage([parts["test"]], [parts["labeled"], parts["unlabeled"]]) == []
    again = split_folder(manifest, {"test": 0.4, "unlabeled": 0.4, "labeled": 0.2}, seed=5)
    assert again["test"].column("key") == parts["test"].column("key")
    with pytest.raises(DataError, match="must be among"):
        split_folder(manifest, {"train": 0.5}, seed=5)
