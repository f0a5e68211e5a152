"""Every guess of a pseudo-label set, most confident first, read from its Parquet file a page at a time."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("key", "status", "class", "confidence", "repeat")


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemFilter:
    """Which guesses; None does not filter. Limits are compared in fp16, like those of selection."""

    class_name: str | None = None
    min_confidence: float | None = None
    max_confidence: float | None = None
    selected: bool | None = None

    def in_half_precision(self) -> ItemFilter:
        """The same filter with limits that a stored confidence can have."""
        return replace(self, min_confidence=_half(self.min_confidence), max_confidence=_half(self.max_confidence))


def _half(value: float | None) -> float | None:
    return None if value is None else float(struct.unpack("<e", struct.pack("<e", value))[0])


def read_items(
    path: Path, class_names: Sequence[str], wanted: ItemFilter, *, position: int, limit: int
) -> tuple[list[dict[str, Any]], int | None]:
    """Up to `limit` rows that pass, from row number `position` on, and where to read on.

    The rows lie in falling confidence, so reading ends at the first row group that begins below `min_confidence`.
    """
    import pyarrow.parquet as pq

    wanted = wanted.in_half_precision()
    found: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + size > position:
                table = file.read_row_group(group, columns=list(COLUMNS))
                if wanted.min_confidence is not None and _begins_below(table, wanted.min_confidence):
                    break
                rows = _pass(table, class_names, wanted, first=first, position=position)
                found += rows.slice(0, limit + 1 - len(found)).to_pylist()
                if len(found) > limit:
                    return [_named(row, class_names) for row in found[:limit]], int(found[limit]["row"])
            first += size
    return [_named(row, class_names) for row in found], None


def _begins_below(table: pa.Table, min_confidence: float) -> bool:
    highest = table.column("confidence")[0].as_py() if table.num_rows else None
    return highest is None or float(highest) < min_confidence


def _pass(table: pa.Table, class_names: Sequence[str], wanted: ItemFilter, *, first: int, position: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    # Comparing fp16 is not in every kernel; as float32 the values are the same.
    table = table.set_column(table.schema.get_field_index("confidence"), "confidence", table.column("confidence").cast(pa.float32()))
    table = table.append_column("row", pa.array(range(first, first + table.num_rows), pa.int64())).slice(max(0, position - first))
    conditions = []
    if wanted.class_name is not None:
        conditions.append(pc.equal(table.column("class"), list(class_names).index(wanted.class_name)))
    if wanted.min_confidence is not None:
        conditions.append(pc.greater_equal(table.column("confidence"), wanted.min_confidence))
    if wanted.max_confidence is not None:
        conditions.append(pc.less(table.column("confidence"), wanted.max_confidence))
    if wanted.selected is not None:
        compare = pc.greater if wanted.selected else pc.equal
        conditions.append(compare(table.column("repeat"), 0))
    # A row without a guess compares as null, and a filter drops null.
    return table.filter(reduce(pc.and_, conditions)) if conditions else table


def _named(row: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    guess = row["class"]
    return {
        "key": row["key"],
        "status": row["status"],
        "class_name": None if guess is None else class_names[guess],
        "confidence": row["confidence"],
        "repeat": row["repeat"] or 0,
    }
