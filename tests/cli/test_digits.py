"""The demo's images: real digits, cut by a seed, written the same way every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cli.digits import DigitFolders, write_digits


def contents(root: Path) -> dict[str, str]:
    """Digest of each file by its path below `root`."""
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.png")}


def counts(folders: DigitFolders) -> tuple[int, int, int]:
    return folders.num_labeled, folders.num_unlabeled, folders.num_test


def test_equal_seeds_write_equal_folders_and_other_seeds_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_digits(tmp_path / name, seed=seed)

    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_all_1797_digits_are_there_and_none_stands_in_two_parts(tmp_path: Path) -> None:
    folders = write_digits(tmp_path)

    digests = list(contents(tmp_path).values())
    assert counts(folders) == (100, 1397, 300)
    assert len(digests) == len(set(digests)) == 1797


def test_labeled_and_test_have_a_folder_per_class_and_the_unlabeled_part_is_flat(tmp_path: Path) -> None:
    folders = write_digits(tmp_path, labeled_per_class=10, test_per_class=5)

    assert {folder.name: len(list(folder.iterdir())) for folder in folders.labeled.iterdir()} == {str(digit): 10 for digit in range(10)}
    assert {folder.name: len(list(folder.iterdir())) for folder in folders.test.iterdir()} == {str(digit): 5 for digit in range(10)}
    assert all(path.is_file() for path in folders.unlabeled.iterdir())


def test_writing_again_replaces_what_lay_there(tmp_path: Path) -> None:
    write_digits(tmp_path, seed=1)

    folders = write_digits(tmp_path, seed=2)

    assert len(contents(tmp_path)) == 1797
    assert counts(folders) == (100, 1397, 300)
