"""Which layout lies at a path, by names alone: endings, patterns of shards, splits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Literal, get_args

from ml.errors import DataError

Format = Literal["auto", "folder", "tar", "parquet", "csv", "jsonl"]
FORMATS: tuple[Format, ...] = get_args(Format)

_OF_SUFFIX: dict[str, Format] = {".tar": "tar", ".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz", ".tar.zst", ".zip")
_BESIDE = (".md", ".json", ".yaml", ".yml", ".txt")
"""Files that may lie beside shards without making a folder something else."""
_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+\.parquet", re.IGNORECASE)
_ACCEPTED = "a folder, .tar, .parquet, .csv or .jsonl, or a pattern of shards like shard-{000..009}.tar"


def shards_of_pattern(path: str) -> tuple[str, ...]:
    """The names that the last part of `shard-{000..009}.tar` stands for; none when it is no such pattern."""
    name = path.rpartition("/")[2]
    found = _PATTERN.search(name)
    if found is None:
        return ()
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= _MOST_SHARDS:
        raise DataError(f"{name} names {len(numbers)} files; between 1 and {_MOST_SHARDS} are read", path=path)
    return tuple(f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}" for number in numbers)


def format_of_file(path: str | os.PathLike[str]) -> Format:
    """By its ending; DataError when that says nothing."""
    name = str(path).rpartition("/")[2].lower()
    if name.endswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, so its images cannot be read one by one; unpack it to a .tar or a folder", path=str(path))
    found = _OF_SUFFIX.get(PurePosixPath(name).suffix)
    if found is None:
        raise DataError(f"{path} is none of what can be read: {_ACCEPTED}", path=str(path))
    return found


def format_of_folder(path: str, names: Iterable[str]) -> Format:
    """Shards when nothing else lies in it, else a folder of images. Names of folders end in a slash."""
    formats: set[Format] = set()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith(".") or suffix in _BESIDE:
            continue
        found = None if name.endswith("/") else _OF_SUFFIX.get(suffix)
        if found not in ("tar", "parquet"):
            return "folder"
        formats.add(found)
    if len(formats) > 1:
        raise DataError(f"{path} holds tar and Parquet files; say which format is meant", path=path)
    return formats.pop() if formats else "folder"


def of_split(root: str, names: tuple[str, ...], split: str | None) -> tuple[str, ...]:
    """The files of one split, as `train-00000-of-00004.parquet` names it, or as its folder `train/` does."""
    of_name = {name: found[1] if (found := _SPLIT.fullmatch(os.path.basename(name))) else name.rpartition("/")[0] for name in names}
    splits = sorted(set(of_name.values()) - {""})
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{root} holds the splits {', '.join(splits[:20])}; say which one is meant", path=root, splits=splits[:100])
        return names
    chosen = tuple(name for name, found in of_name.items() if found == split)
    if not chosen:
        raise DataError(f"{root} has no split {split!r}, only {', '.join(splits[:20]) or 'one without a name'}", path=root)
    return chosen
