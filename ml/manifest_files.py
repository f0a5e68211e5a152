"""Manifests larger than memory: rows come in any order, in batches, and lie by key in the end.

What is held meanwhile is a batch of rows, and where keys do not come in order, the keys and a number for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml import manifest as manifests
from ml.errors import DataError
from ml.files import written_aside
from ml.manifest import COLUMNS, LOCATION_COLUMNS, Kind

Row = tuple[Any, ...]
"""Values of COLUMNS and LOCATION_COLUMNS."""

_NAMES = (*COLUMNS, *LOCATION_COLUMNS)
_KEY = COLUMNS.index("key")
_SLAB = 4
"""Row groups that are put in order at a time, or more where that would make more parts than:"""
_MOST_PARTS = 200
_RANK = "rank"
"""Of a row when all are sorted by key; a column of the parts only."""


class RowFile:
    """Rows on their way into a manifest, in the order in which they come; a context manager that completes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self.is_sorted = True
        self._last = ""
        self._waiting: list[Row] = []
        self._writer = pq.ParquetWriter(path, manifests.schema(), compression="zstd")

    def add(self, row: Row) -> None:
        """DataError for a key that came just before."""
        key = row[_KEY]
        if self.num_rows and key <= self._last:
            if key == self._last:
                raise DataError(f"the key {key!r} stands twice", key=key)
            self.is_sorted = False
        self._last = key
        self.num_rows += 1
        self._waiting.append(row)
        if len(self._waiting) >= manifests.BATCH_ROWS:
            self._write()

    def _write(self) -> None:
        columns = dict(zip(_NAMES, map(list, zip(*self._waiting, strict=True)), strict=True))
        self._writer.write_table(pa.table(columns, schema=manifests.schema()))
        self._waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._waiting:
            self._write()
        self._writer.close()


def write_manifest(rows: RowFile, path: Path, *, root: str | Path, kind: Kind, class_names: Sequence[str]) -> None:
    """Put the rows of a complete file in order: a manifest at `path`, whole or not at all."""
    schema = manifests.schema().with_metadata(manifests.metadata_of(root, kind, class_names))
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for table in _as_they_lie(rows.path) if rows.is_sorted else _by_key(rows.path):
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=manifests.BATCH_ROWS)


def _as_they_lie(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def _by_key(path: Path) -> Iterator[pa.Table]:
    """Some row groups of the result at a time. Each row is read twice and written once in between, however many there are."""
    ranks_N = _ranks(path)
    slab = max(_SLAB * manifests.BATCH_ROWS, -(-len(ranks_N) // _MOST_PARTS))
    with TemporaryDirectory(dir=path.parent, prefix=".parts-") as folder:
        parts = [Path(folder) / f"{number}.arrow" for number in range(-(-len(ranks_N) // slab))]
        _share_out(path, ranks_N, slab, parts)
        del ranks_N
        for part in parts:
            with pa.OSFile(str(part)) as file:
                table = pa.ipc.open_stream(file).read_all()
            part.unlink()
            order = np.argsort(table.column(_RANK).to_numpy())
            yield table.drop_columns(_RANK).take(pa.array(order)).combine_chunks()


def _share_out(path: Path, ranks_N: npt.NDArray[np.uint32], slab: int, parts: Sequence[Path]) -> None:
    """Write each row of the file at `path`, with its rank, into the part that its rank lies in."""
    schema = manifests.schema().append(pa.field(_RANK, pa.uint32()))
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(part), schema, options=options)) for part in parts]
        file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False))
        first = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).replace_schema_metadata(None)
            ranks = ranks_N[first : first + len(table)]
            first += len(table)
            order = np.argsort(ranks)
            table = table.append_column(schema.field(_RANK), pa.array(ranks)).take(pa.array(order))
            bounds = np.searchsorted(ranks[order] // slab, np.arange(len(parts) + 1))
            for number, writer in enumerate(writers):
                start, stop = int(bounds[number]), int(bounds[number + 1])
                if start < stop:
                    writer.write_table(table.slice(start, stop - start).combine_chunks())


def _ranks(path: Path) -> npt.NDArray[np.uint32]:
    """The place of each row when they are sorted by key."""
    # Texts with 64-bit places: together the keys may have more than 2 GiB.
    keys = pq.read_table(path, columns=["key"], partitioning=None, pre_buffer=False).column("key").cast(pa.large_string())
    # Of ten million rows each array of eight bytes a row would be 80 MB.
    order = pc.sort_indices(keys).to_numpy().astype(np.uint32)
    del keys
    pa.default_memory_pool().release_unused()
    ranks_N = np.empty(len(order), dtype=np.uint32)
    ranks_N[order] = np.arange(len(order), dtype=np.uint32)
    return ranks_N
