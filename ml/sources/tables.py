"""Parquet files with the images' bytes in a column, as Hugging Face's datasets have them (see `ml.image_columns`).

Keys are the `key` column where there is one, else the paths beside the bytes where all of them are there, relative and
different, else the file's name and the number of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

from ml.errors import DataError
from ml.image_columns import ImageColumns, find_columns
from ml.locations import forget
from ml.manifest import Kind
from ml.sources.listing import Entry, Fingerprints, Notes, check_name
from ml.sources.roots import Root

_BATCH = 8192

KeysFrom = Literal["column", "path", "row"]


class ParquetSource:
    """Some Parquet files below `root`."""

    has_unique_keys = False
    no_classes = "gives no image a class: a `label` column is needed, integers with names in the schema's metadata or strings"

    def __init__(self, root: Root, names: tuple[str, ...]) -> None:
        self.root = root
        self.names = names

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """As they lie. DataError for a file that is damaged or has other columns."""
        for name in self.names:
            forget(f"{self.root}/{name}")
            with self._opened(name) as (file, columns):
                if kind != "unlabeled" and columns.label is None:
                    there = ", ".join(file.schema_arrow.names)
                    raise DataError(f"{name} has no label among its columns {there}: it {self.no_classes}", path=name)
                yield from self._of_file(file, columns, name, kind, notes)

    def _of_file(self, file: Any, columns: ImageColumns, name: str, kind: Kind, notes: Notes) -> Iterator[Entry]:
        key_column = {"column": columns.key, "path": f"{columns.image}.path", "row": None}[self._keys_from]
        label = None if kind == "unlabeled" else columns.label
        stem = name.removesuffix(".parquet")
        row = 0
        for keys, labels in _read(file, key_column, label):
            for text, value in zip(keys, labels, strict=True):
                key, reason = (f"{stem}/{row:09d}", None) if text is None else check_name(text)
                class_name = None if label is None else _class_of(value, columns, f"{name}, row {row}")
                if reason is not None:
                    raise DataError(f"{name}, row {row}: the key {key[:200]!r} cannot be one: {reason}", path=name)
                if notes.admits(kind, key, class_name):
                    yield Entry(key, class_name, name, row)
                row += 1

    @cached_property
    def _keys_from(self) -> KeysFrom:
        """One rule for all files."""
        found = []
        for name in self.names:
            with self._opened(name) as (_, columns):
                found.append(columns)
        if all(columns.key for columns in found):
            return "column"
        return "path" if all(columns.has_path for columns in found) and self._paths_are_keys() else "row"

    def _paths_are_keys(self) -> bool:
        prints = Fingerprints()
        for name in self.names:
            with self._opened(name) as (file, columns):
                for paths, _ in _read(file, f"{columns.image}.path", None):
                    for path in paths:
                        if path is None or check_name(path)[1] is not None:
                            return False
                        prints.add(check_name(path)[0])
        return not prints.repeated()

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Any, ImageColumns]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.root.open_table(name)) as file:
                yield file, find_columns(file.schema_arrow, of=name)
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"{name} is no whole Parquet file: {error}", path=name) from error


def _read(file: Any, key: str | None, label: str | None) -> Iterator[tuple[list[Any], list[Any]]]:
    """Keys and labels, some thousand rows at a time; None where a column is not asked for. The images are not read."""
    import pyarrow.compute as pc

    wanted = [name for name in (key, label) if name is not None]
    if not wanted:
        for start in range(0, file.metadata.num_rows, _BATCH):
            nothing = [None] * min(_BATCH, file.metadata.num_rows - start)
            yield nothing, nothing
        return
    for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
        nothing = [None] * batch.num_rows
        keys = nothing
        if key is not None:
            column, dot, part = key.partition(".")
            keys = (pc.struct_field(batch.column(column), part) if dot else batch.column(column)).to_pylist()
        yield keys, nothing if label is None else batch.column(label).to_pylist()


def _class_of(value: Any, columns: ImageColumns, where: str) -> str | None:
    """The class that a label stands for; None for null, for -1, which stands for "not told", and for no text."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            return None
        if columns.class_names is None:
            return str(value)
        if value < len(columns.class_names):
            return columns.class_names[value]
        raise DataError(f"{where}: the label {value} is none of the {len(columns.class_names)} classes of the schema", path=where)
    return (str(value).strip() or None) if value is not None else None
