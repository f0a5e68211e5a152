"""Rows of a Parquet file a page at a time: one row group in memory, whatever the file's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(
    path: Path, *, position: int, limit: int, columns: Sequence[str], equal: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], int | None]:
    """Up to `limit` rows from row number `position` on whose columns equal the given texts, and the position to read on from."""
    # pyarrow costs 40 MB and is loaded at its first use.
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + size > position and _may_hold(file.metadata.row_group(group), equal or {}):
                table = file.read_row_group(group, columns=sorted({*columns, *(equal or {})}))
                table = table.append_column("row", [list(range(first, first + size))])
                table = table.slice(max(0, position - first))
                for name, text in (equal or {}).items():
                    table = table.filter(pc.equal(table.column(name), text))
                rows += table.slice(0, limit + 1 - len(rows)).to_pylist()
                if len(rows) > limit:
                    return [_without_row(row, columns) for row in rows[:limit]], int(rows[limit]["row"])
            first += size
    return [_without_row(row, columns) for row in rows], None


def _may_hold(group: Any, equal: dict[str, str]) -> bool:
    """Whether some row of the group may have these texts: a broken file among millions is found without reading the whole ones."""
    for place in range(group.num_columns):
        column = group.column(place)
        text = equal.get(column.path_in_schema)
        known = column.statistics if text is not None and column.is_stats_set else None
        if known is not None and known.has_min_max and not known.min <= text <= known.max:
            return False
    return True


def _without_row(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in columns}
