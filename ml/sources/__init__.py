"""What a dataset can be read from: class folders, tar shards, Parquet files, CSV and JSON-lines lists; here or in S3. No torch.

The same images have the same keys, classes and bytes in each of them, so that their manifests have the same digest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ml.errors import DataError, NoImages
from ml.objects import is_address, split_address
from ml.sources.buckets import open_bucket
from ml.sources.folders import FolderSource
from ml.sources.formats import FORMATS, Format, format_of_file, format_of_folder, of_split, shards_of_pattern
from ml.sources.listing import CLASSES_FILE, Source
from ml.sources.lists import ListSource
from ml.sources.roots import Folder
from ml.sources.tables import ParquetSource
from ml.sources.tars import TarSource


def locate(path: str | Path) -> str:
    """The same place named from everywhere: an absolute path, links followed, or an address."""
    if not is_address(str(path)):
        return str(Path(path).resolve())
    split_address(str(path))
    return str(path).rstrip("/")


def open_source(path: str | Path, *, source_format: Format = "auto", split: str | None = None) -> Source:
    """What lies at `path`, ready to be listed; `split` chooses one where a list or Parquet files hold several.

    Raises NoImages when nothing is there, DataError when it is none of the formats, or not the one that is asked for.
    """
    if is_address(str(path)):
        return open_bucket(str(path), source_format, split)
    path = Path(path)
    root, names = expand_pattern(path)
    if not names and not path.exists():
        raise NoImages(f"{path} is no folder and no file: give the path of an existing one", path=str(path))
    found = source_format
    if found == "auto":
        is_folder = path.is_dir() and not names
        found = format_of_folder(str(path), _names_in(path)) if is_folder else format_of_file(names[0] if names else path)
    if split is not None and found in ("folder", "tar"):
        raise DataError(f"{path} is read as {found}, which has no splits; give the path of the part that is meant", path=str(path))
    if found == "folder":
        if not path.is_dir():
            raise NoImages(f"{path} is no folder: give the path of an existing one", path=str(path))
        return FolderSource(Folder(path.resolve()))
    if found in ("csv", "jsonl"):
        if not path.is_file():
            raise DataError(f"{path} is no {found} file", path=str(path))
        path = path.resolve()
        return ListSource(Folder(path.parent), path.name, "csv" if found == "csv" else "jsonl", split)
    if not names:
        root, names = _shards(path, f".{found}")
    escaping = [name for name in names if not (root / name).resolve().is_relative_to(root)]
    if escaping:
        raise DataError(f"symbolic links lead out of {root}: {', '.join(escaping[:10])}", path=str(root), keys=escaping[:100])
    return TarSource(Folder(root), names) if found == "tar" else ParquetSource(Folder(root), of_split(str(root), names, split))


def expand_pattern(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Folder and file names of `shard-{000..009}.tar`; no names when `path` is no such pattern, or a file of that very name exists."""
    names = () if path.exists() else shards_of_pattern(str(path))
    if not names:
        return path, ()
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise NoImages(f"{path}: {len(absent)} of {len(names)} files are not there, for example {absent[0]}", path=str(path))
    return path.parent.resolve(), names


def _names_in(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield f"{entry.name}/" if entry.is_dir() else entry.name


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


__all__ = ["CLASSES_FILE", "FORMATS", "Format", "Source", "expand_pattern", "format_of_file", "locate", "open_source"]
