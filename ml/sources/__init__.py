"""What a dataset can be read from: class folders, tar shards, Parquet files, CSV and JSON-lines lists. No torch.

The same images have the same keys, classes and bytes in each of them, so that their manifests have the same digest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, get_args

from ml.errors import DataError, NoImages
from ml.sources.folders import FolderSource
from ml.sources.listing import CLASSES_FILE, Source
from ml.sources.lists import ListSource
from ml.sources.tables import ParquetSource
from ml.sources.tars import TarSource

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


def open_source(path: str | Path, *, source_format: Format = "auto", split: str | None = None) -> Source:
    """What lies at `path`, ready to be listed; `split` chooses one where a list or Parquet files hold several.

    Raises NoImages when nothing is there, DataError when it is none of the formats, or not the one that is asked for.
    """
    path = Path(path)
    root, names = expand_pattern(path)
    if not names and not path.exists():
        raise NoImages(f"{path} is no folder and no file: give the path of an existing one", path=str(path))
    found = source_format
    if found == "auto":
        found = _format_of_folder(path) if path.is_dir() and not names else format_of_file(names[0] if names else path)
    if split is not None and found in ("folder", "tar"):
        raise DataError(f"{path} is read as {found}, which has no splits; give the path of the part that is meant", path=str(path))
    if found == "folder":
        if not path.is_dir():
            raise NoImages(f"{path} is no folder: give the path of an existing one", path=str(path))
        return FolderSource(path.resolve())
    if found in ("csv", "jsonl"):
        if not path.is_file():
            raise DataError(f"{path} is no {found} file", path=str(path))
        return ListSource(path.resolve(), "csv" if found == "csv" else "jsonl", split)
    if not names:
        root, names = _shards(path, f".{found}")
    escaping = [name for name in names if not (root / name).resolve().is_relative_to(root)]
    if escaping:
        raise DataError(f"symbolic links lead out of {root}: {', '.join(escaping[:10])}", path=str(root), keys=escaping[:100])
    return TarSource(root, names) if found == "tar" else ParquetSource(root, _of_split(root, names, split))


def expand_pattern(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Folder and file names of `shard-{000..009}.tar`; no names when `path` is no such pattern, or a file of that very name exists."""
    found = _PATTERN.search(path.name)
    if found is None or path.exists():
        return path, ()
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= _MOST_SHARDS:
        raise DataError(f"{path.name} names {len(numbers)} files; between 1 and {_MOST_SHARDS} are read", path=str(path))
    names = tuple(f"{path.name[: found.start()]}{number:0{len(first)}d}{path.name[found.end() :]}" for number in numbers)
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise NoImages(f"{path}: {len(absent)} of {len(names)} files are not there, for example {absent[0]}", path=str(path))
    return path.parent.resolve(), names


def format_of_file(path: str | Path) -> Format:
    """By its ending; DataError when that says nothing."""
    name = Path(path).name.lower()
    if name.endswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, so its images cannot be read one by one; unpack it to a .tar or a folder", path=str(path))
    found = _OF_SUFFIX.get(Path(name).suffix)
    if found is None:
        raise DataError(f"{path} is none of what can be read: {_ACCEPTED}", path=str(path))
    return found


def _format_of_folder(folder: Path) -> Format:
    """Shards when nothing else lies in it, else a folder of images."""
    formats: set[Format] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(".") or (suffix in _BESIDE and entry.is_file()):
                continue
            found = None if entry.is_dir() else _OF_SUFFIX.get(suffix)
            if found not in ("tar", "parquet"):
                return "folder"
            formats.add(found)
    if len(formats) > 1:
        raise DataError(f"{folder} holds tar and Parquet files; say which format is meant", path=str(folder))
    return formats.pop() if formats else "folder"


def _shards(path: Path, suffix: str) -> tuple[Path, tuple[str, ...]]:
    """The shards that `path` is or holds: their folder, and their paths below it."""
    path = path.resolve()
    if path.is_file():
        if suffix == ".parquet" and path.suffix != suffix:
            raise DataError(f"{path} must end in {suffix} to be read as such", path=str(path))
        return path.parent, (path.name,)
    names = sorted(found.relative_to(path).as_posix() for found in path.rglob(f"*{suffix}") if found.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise NoImages(f"{path} holds no {suffix} file", path=str(path))
    return path, tuple(names)


def _of_split(root: Path, names: tuple[str, ...], split: str | None) -> tuple[str, ...]:
    """The files of one split, as `train-00000-of-00004.parquet` names it, or as its folder `train/` does."""
    of_name = {name: found[1] if (found := _SPLIT.fullmatch(os.path.basename(name))) else name.rpartition("/")[0] for name in names}
    splits = sorted(set(of_name.values()) - {""})
    if split is None:
        if len(splits) > 1:
            raise DataError(
                f"{root} holds the splits {', '.join(splits[:20])}; say which one is meant", path=str(root), splits=splits[:100]
            )
        return names
    chosen = tuple(name for name, found in of_name.items() if found == split)
    if not chosen:
        raise DataError(f"{root} has no split {split!r}, only {', '.join(splits[:20]) or 'one without a name'}", path=str(root))
    return chosen


__all__ = ["CLASSES_FILE", "FORMATS", "Format", "Source", "expand_pattern", "format_of_file", "open_source"]
