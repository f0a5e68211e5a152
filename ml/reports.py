"""What reading a dataset found: broken files, duplicates, classes, sizes, oddities. From columns, so that memory stays small.

N usable rows of a manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.manifest import Kind, digest_of, read_batches
from ml.sources.listing import EXAMPLES, Notes

_IN_A_GROUP = 10


@dataclass(slots=True)
class Counts:
    """What is counted while the rows are made."""

    statuses: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Keys of every status but ok; of a few rows each."""
    classes: Counter[str] = field(default_factory=Counter)
    """Of usable images."""

    def add(self, key: str, class_name: str | None, status: str) -> None:
        self.statuses[status] += 1
        if status == "ok" and class_name is not None:
            self.classes[class_name] += 1
        elif status != "ok":
            self.examples.setdefault(status, []).append(key)
            if len(self.examples[status]) > 2 * EXAMPLES:
                self._forget(status)

    def _forget(self, status: str) -> None:
        # The first by key, whatever the order in which they come.
        self.examples[status] = sorted(self.examples[status])[:EXAMPLES]

    @property
    def num_rows(self) -> int:
        return sum(self.statuses.values())

    def to_dict(self) -> dict[str, Any]:
        """As a report and a refusal show them."""
        examples = {status: sorted(keys)[:EXAMPLES] for status, keys in sorted(self.examples.items())}
        return {"statuses": dict(sorted(self.statuses.items())), "examples": examples}


class _Groups(NamedTuple):
    """Rows that share a value: the largest groups first, then by their first row. Only groups of two or more."""

    rows: npt.NDArray[np.uint32]
    """Those of a group together and in their order."""
    starts: npt.NDArray[np.int64]
    """Where in `rows` each group begins."""
    counts: npt.NDArray[np.int64]

    def members(self, group: int, most: int) -> list[int]:
        start = int(self.starts[group])
        found: list[int] = self.rows[start : start + min(int(self.counts[group]), most)].tolist()
        return found

    def largest(self) -> list[list[int]]:
        """As many rows as a report shows."""
        return [self.members(group, _IN_A_GROUP) for group in range(min(EXAMPLES, len(self.counts)))]


def _firsts_and_groups(*columns: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint32], _Groups]:
    """The first row of every value, sorted, and the groups of rows that agree in all columns."""
    order = np.lexsort(columns).astype(np.uint32)
    begins = np.zeros(len(order), dtype=bool)
    begins[:1] = True
    for column in columns:
        inside = column[order]
        begins[1:] |= inside[1:] != inside[:-1]
    firsts = np.sort(order[begins])
    starts = np.flatnonzero(begins)
    counts = np.diff(np.append(starts, len(order)))
    # Most rows share nothing: only the others are kept.
    rows = order[np.repeat(counts > 1, counts)]
    counts = counts[counts > 1]
    starts = np.cumsum(counts) - counts
    largest = np.lexsort((rows[starts], -counts))
    return firsts, _Groups(rows, starts[largest], counts[largest])


def build_report(path: Path, *, kind: Kind, counts: Counts, notes: Notes) -> dict[str, Any]:
    """The JSON-able report of the manifest at `path`."""
    num_usable = counts.statuses["ok"]
    _, files = _firsts_and_groups(*_read_digests(path, "digest", num_usable))
    first_rows, pixels = _firsts_and_groups(*_read_digests(path, "pixel_digest", num_usable))
    near, near_rows = _near(path, first_rows)
    torn = _torn(path, pixels) if kind != "unlabeled" else []
    torn_rows = list(islice((row for group in torn for row in pixels.members(group, EXAMPLES)), EXAMPLES))
    shown = {
        "duplicate_files": files.largest(),
        "duplicate_pixels": pixels.largest(),
        "near_duplicates": [[int(near_rows[row]) for row in group] for group in near.largest()],
    }
    keys = _read_keys(path, {row for groups in (*shown.values(), [torn_rows]) for group in groups for row in group})
    report: dict[str, Any] = {
        "kind": kind,
        "num_files": counts.num_rows,
        "num_usable": num_usable,
        **counts.to_dict(),
        "classes": dict(sorted(counts.classes.items())),
        "sizes": {name: _range(_read_numbers(path, name)) for name in ("width", "height", "bytes")},
    }
    for name, groups in (("duplicate_files", files), ("duplicate_pixels", pixels), ("near_duplicates", near)):
        report[name] = {
            "num_groups": len(groups.counts),
            "num_extra": int((groups.counts - 1).sum()),
            "examples": [[keys[row] for row in group] for group in shown[name]],
        }
    report["digest"] = digest_of(path)
    report["warnings"] = _warnings(report, notes, len(torn), [keys[row] for row in torn_rows])
    return report


def _usable(path: Path, name: str) -> Iterable[Any]:
    """One column of the usable rows, in batches."""
    for table in read_batches(path, (name, "status")):
        yield table.filter(pc.equal(table.column("status"), "ok")).column(name).combine_chunks()


def _read_digests(path: Path, name: str, num_rows: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Half of each SHA-256, as two numbers: no two that differ will ever agree in 128 bits."""
    high, low = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
    first = 0
    for column in _usable(path, name):
        part = slice(first, first + len(column))
        numbers = _numbers_of_hex(column)
        high[part], low[part] = numbers[:, 0], numbers[:, 1]
        first += len(column)
    return high, low


def _numbers_of_hex(column: Any) -> npt.NDArray[np.uint64]:
    """uint64 [N, 2] of texts of 32 hexadecimal digits or more."""
    digits = np.array(pc.utf8_slice_codeunits(column, 0, 32).to_numpy(zero_copy_only=False), dtype="S32")
    codes = digits.view(np.uint8).reshape(len(digits), 32)
    nibbles = (codes & 15) + 9 * (codes >> 6)
    packed = np.ascontiguousarray(nibbles[:, ::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)
    return packed.view(">u8").astype(np.uint64).reshape(len(digits), 2)


def _read_numbers(path: Path, name: str) -> npt.NDArray[Any]:
    return np.concatenate([column.to_numpy(zero_copy_only=False) for column in _usable(path, name)])


def _near(path: Path, first_rows: npt.NDArray[np.uint32]) -> tuple[_Groups, npt.NDArray[np.uint32]]:
    """Groups of equal perceptual hashes among rows with different pixels, and which rows their numbers mean."""
    hashes, rows, first = [], [], 0
    for column in _usable(path, "perceptual_hash"):
        inside = first_rows[np.searchsorted(first_rows, first) : np.searchsorted(first_rows, first + len(column))]
        of_column = column.take(pa.array(inside - np.uint32(first)))
        rows.append(inside[of_column.is_valid().to_numpy(zero_copy_only=False)])
        hashes.append(of_column.drop_null().to_numpy(zero_copy_only=False))
        first += len(column)
    return _firsts_and_groups(np.concatenate(hashes))[1], np.concatenate(rows)


def _torn(path: Path, pixels: _Groups) -> list[int]:
    """Numbers of the groups of equal pixels that stand under more than one class."""
    if not len(pixels.counts):
        return []
    names: dict[str, int] = {}
    codes = np.concatenate(
        [
            np.array([names.setdefault(name, len(names)) for name in column.to_pylist()], dtype=np.int32)
            for column in _usable(path, "class_name")
        ]
    )
    of_class = codes[pixels.rows]
    return [
        group
        for group, (start, count) in enumerate(zip(pixels.starts.tolist(), pixels.counts.tolist(), strict=True))
        if (of_class[start : start + count] != of_class[start]).any()
    ]


def _read_keys(path: Path, rows: set[int]) -> dict[int, str]:
    """Keys of some usable rows."""
    wanted, first = np.array(sorted(rows), dtype=np.int64), 0
    keys: dict[int, str] = {}
    for column in _usable(path, "key"):
        inside = wanted[(wanted >= first) & (wanted < first + len(column))]
        keys |= dict(zip(inside.tolist(), column.take(pa.array(inside - first)).to_pylist(), strict=True))
        first += len(column)
    return keys


def _range(values: npt.NDArray[Any]) -> dict[str, float]:
    median = float(np.median(values))
    return {"min": int(values.min()), "median": int(median) if len(values) % 2 else median, "max": int(values.max())}


def _warnings(report: Mapping[str, Any], notes: Notes, num_torn: int, torn_keys: Sequence[str]) -> list[dict[str, Any]]:
    warnings: list[dict[str, Any]] = []

    def warn(code: str, message: str, keys: Sequence[str] = ()) -> None:
        warnings.append({"code": f"ingestion.{code}", "message": message, "examples": list(keys)[:EXAMPLES]})

    for reason, left_out in sorted(notes.left_out.items()):
        warn("left_out", f"{left_out.count} entries are left out: {reason}", sorted(left_out.examples))
    for status, count in report["statuses"].items():
        if status != "ok":
            warn("unusable_files", f"{count} files are {status}", report["examples"][status])
    lonely = [name for name, count in report["classes"].items() if count == 1]
    if lonely:
        warn("single_image_class", f"{len(lonely)} classes have one image only, too few to cut validation from", lonely)
    if num_torn:
        warn("contradicting_labels", f"{num_torn} pictures stand under more than one class", torn_keys)
    extra = report["duplicate_pixels"]["num_extra"]
    if extra:
        firsts = [group[0] for group in report["duplicate_pixels"]["examples"]]
        warn("duplicates", f"{extra} images repeat the pixels of another one", firsts)
    return warnings
