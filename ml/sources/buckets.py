"""What lies below a prefix of a bucket: objects as images, or shards, tables and lists that are objects."""

from __future__ import annotations

from collections.abc import Iterator

from ml.errors import DataError, NoImages
from ml.manifest import Kind
from ml.objects import find, list_objects, split_address
from ml.sources.formats import Format, format_of_file, format_of_folder, of_split, shards_of_pattern
from ml.sources.listing import Entry, Notes, Source, check_name, class_of_folder, is_hidden
from ml.sources.lists import ListSource
from ml.sources.roots import Prefix
from ml.sources.tables import ParquetSource
from ml.sources.tars import TarSource

_NO_PATHS = "their names are no paths: they have an empty part, or `.` for one"


class PrefixSource:
    """Every object below `root` that is not hidden."""

    has_unique_keys = True
    no_classes = "has no class folders: put the images of each class below a prefix of its own"

    def __init__(self, root: Prefix) -> None:
        self.root = root

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """As the store lists them: by key, but for stores that keep no order."""
        for name, num_bytes in list_objects(str(self.root)):
            key, reason = check_name(name)
            if reason is None and is_hidden(key):
                continue
            if name.endswith("/"):
                # What tools put there to show a folder that may be empty.
                if kind != "unlabeled" and num_bytes == 0 and "/" not in key:
                    notes.classes.add(key)
                continue
            if reason is None and key != name:
                reason = _NO_PATHS
            class_name = None if kind == "unlabeled" else class_of_folder(key)
            if reason is None and kind != "unlabeled" and class_name is None:
                reason = "they lie beside the class folders, not in one"
            if reason is not None:
                notes.leave_out(reason, key)
            elif notes.admits(kind, key, class_name):
                yield Entry(key, class_name, length=num_bytes)


def open_bucket(address: str, source_format: Format, split: str | None) -> Source:
    """What lies at the address; NoImages when nothing does, StoreRefused when the store does not let it be listed."""
    bucket, key = split_address(address)
    address, names = f"s3://{bucket}/{key}".rstrip("/"), shards_of_pattern(key)
    folder, _, name = address.rpartition("/")
    is_object = bool(key) and find(address) is not None
    if is_object:
        names = (name,)
    elif names:
        _check_there(address, folder, names)
    elif next(list_objects(address), None) is None:
        raise NoImages(f"{address}: no object has this name or lies below it; give an existing prefix", path=address)
    found = source_format
    if found == "auto":
        found = (
            format_of_file(names[0]) if names else format_of_folder(address, (listed.name for listed in list_objects(address, deep=False)))
        )
    if split is not None and found in ("folder", "tar"):
        raise DataError(f"{address} is read as {found}, which has no splits; give the address of the part that is meant", path=address)
    if found == "folder":
        if names:
            raise NoImages(f"{address} is no prefix of objects: give an existing one", path=address)
        return PrefixSource(Prefix(address))
    if found in ("csv", "jsonl"):
        if not is_object:
            raise DataError(f"{address} is no {found} object", path=address)
        return ListSource(Prefix(folder), name, "csv" if found == "csv" else "jsonl", split)
    root = Prefix(folder if names else address)
    names = names or _shards(address, f".{found}")
    if found == "tar":
        return TarSource(root, names)
    if not names[0].endswith(".parquet"):
        raise DataError(f"{address} must end in .parquet to be read as such", path=address)
    return ParquetSource(root, of_split(str(root), names, split))


def _check_there(address: str, folder: str, names: tuple[str, ...]) -> None:
    there = {listed.name for listed in list_objects(folder, deep=False, start=address.rpartition("/")[2].partition("{")[0])}
    absent = [name for name in names if name not in there]
    if absent:
        raise NoImages(f"{address}: {len(absent)} of {len(names)} objects are not there, for example {absent[0]}", path=address)


def _shards(address: str, suffix: str) -> tuple[str, ...]:
    """The shards below a prefix, however deep."""
    names = sorted(
        name for name, _ in list_objects(address) if name.endswith(suffix) and check_name(name) == (name, None) and not is_hidden(name)
    )
    if not names:
        raise NoImages(f"no {suffix} object lies below {address}", path=address)
    return tuple(names)
