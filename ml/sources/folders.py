"""Folders of images: one folder per class for labeled ones (images may lie deeper), flat or nested for unlabeled ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ml.manifest import Kind
from ml.sources.listing import Entry, Notes, class_of_folder
from ml.sources.roots import Folder

_FEW = 65536


class FolderSource:
    """Every file below `root` that is not hidden."""

    has_unique_keys = True
    no_classes = "has no class folders: put the images of each class into a folder of its own"

    def __init__(self, root: Folder) -> None:
        self.root = root

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """By key: one folder's names are in memory at a time, and those of the folders above it."""
        levels = [("", _sorted(self._names("", kind, notes)))]
        while levels:
            prefix, names = levels[-1]
            name = next(names, None)
            if name is None:
                levels.pop()
            elif name.endswith("/"):
                # "b/" sorts among its neighbors as "b/x" does: the keys come in their order.
                levels.append((prefix + name, _sorted(self._names(prefix + name, kind, notes))))
            else:
                key = prefix + name
                yield Entry(key, None if kind == "unlabeled" else class_of_folder(key))

    def _names(self, prefix: str, kind: Kind, notes: Notes) -> Iterator[str]:
        with os.scandir(self.root.path / prefix) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and self._is_listed(entry, prefix, kind, notes):
                    yield f"{entry.name}/" if entry.is_dir() else entry.name

    def _is_listed(self, entry: os.DirEntry[str], prefix: str, kind: Kind, notes: Notes) -> bool:
        key = f"{prefix}{entry.name}"
        try:
            key.encode()
        except UnicodeEncodeError:
            notes.leave_out("their names are not UTF-8", ascii(key))
            return False
        if entry.is_symlink():
            if not Path(entry.path).resolve().is_relative_to(self.root.path):
                notes.escaping.append(key)
                return False
            if entry.is_dir():
                # Its files are reached without it; following it may never end.
                notes.leave_out("they are linked folders", key)
                return False
        if not prefix and kind != "unlabeled":
            if not entry.is_dir():
                notes.leave_out("they lie beside the class folders, not in one", key)
                return False
            notes.classes.add(entry.name)
        return True


def _sorted(names: Iterator[str]) -> Iterator[str]:
    """The names in order; many of them as one block of text, because each Python string costs 50 bytes beside its own."""
    few = list(islice(names, _FEW))
    if len(few) < _FEW:
        return iter(sorted(few))
    import pyarrow as pa

    chunks = []
    while few:
        chunks.append(pa.array(few, pa.large_string()))
        few = list(islice(names, _FEW))
    return _in_order(pa.chunked_array(chunks).combine_chunks())


def _in_order(names: object) -> Iterator[str]:
    import pyarrow.compute as pc

    order = pc.array_sort_indices(names)
    for start in range(0, len(order), _FEW):
        yield from pc.take(names, order[start : start + _FEW]).to_pylist()
