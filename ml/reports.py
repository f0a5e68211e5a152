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

    order: npt.NDArray[np.int64]
    """All rows, those of a group together and in their order."""
    starts: npt.NDArray[np.int64]
    """Where in `order` each group begins."""
    counts: npt.NDArray[np.int64]

    def members(self, group: int, most: int | None = None) -> list[int]:
        start, count = int(self.starts[group]), int(self.counts[group])
        rows: list[int] = self.order[start : start + (count if most is None else min(count, most))].tolist()
        return rows


def _firsts_and_groups(*columns: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], _Groups]:
    """The first row of every value, sorted, and the groups of rows that agree in all columns."""
    order = np.lexsort(columns)
    same = np.ones(max(0, len(order) - 1), dtype=bool)
    for column in columns:
        inside = column[order]
        same &= inside[1:] == inside[:-1]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(order)), dtype=bool), ~same]))
    counts = np.diff(np.append(starts, len(order)))
    firsts = np.sort(order[starts])
    starts, counts = starts[counts > 1], counts[counts > 1]
    largest = np.lexsort((order[starts], -counts))
    return firsts, _Groups(order, starts[largest], counts[largest])


def build_report(path: Path, *, kind: Kind, counts: Counts, notes: Notes) -> dict[str, Any]:
    """The JSON-able report of the manifest at `path`."""
    _, files = _firsts_and_groups(*_read_digests(path, "digest"))
    first_rows, pixels = _firsts_and_groups(*_read_digests(path, "pixel_digest"))
    near, near_rows = _near(path, first_rows)
    torn = _torn(path, pixels) if kind != "unlabeled" else []
    shown = {
        "duplicate_files": [files.members(group, _IN_A_GROUP) for group in range(min(EXAMPLES, len(files.counts)))],
        "duplicate_pixels": [pixels.members(group, _IN_A_GROUP) for group in range(min(EXAMPLES, len(pixels.counts)))],
        "near_duplicates": [
            [int(near_rows[row]) for row in near.members(group, _IN_A_GROUP)] for group in range(min(EXAMPLES, len(near.counts)))
        ],
        "torn": [list(islice((row for group in torn for row in pixels.members(group, EXAMPLES)), EXAMPLES))],
    }
    keys = _read_keys(path, {row for groups in shown.values() for group in groups for row in group})
    report: dict[str, Any] = {
        "kind": kind,
        "num_files": counts.num_rows,
        "num_usable": counts.statuses["ok"],
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
    report["warnings"] = _warnings(report, notes, len(torn), [keys[row] for row in shown["torn"][0]])
    return report


def _usable(path: Path, name: str) -> Iterable[Any]:
    """One column of the usable rows, in batches."""
    for table in read_batches(path, (name, "status")):
        yield table.filter(pc.equal(table.column("status"), "ok")).column(name).combine_chunks()


def _read_digests(path: Path, name: str) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Half of each SHA-256, as two numbers: no two that differ will ever agree in 128 bits."""
    halves = [_numbers_of_hex(column) for column in _usable(path, name)]
    digests = np.concatenate(halves) if halves else np.zeros((0, 2), np.uint64)
    return np.ascontiguousarray(digests[:, 0]), np.ascontiguousarray(digests[:, 1])


def _numbers_of_hex(column: Any) -> npt.NDArray[np.uint64]:
    """uint64 [N, 2] of texts of 32 hexadecimal digits or more."""
    digits = np.array(pc.utf8_slice_codeunits(column, 0, 32).to_numpy(zero_copy_only=False), dtype="S32")
    codes = digits.view(np.uint8).reshape(len(digits), 32)
    nibbles = (codes & 15) + 9 * (codes >> 6)
    packed = np.ascontiguousarray(nibbles[:, ::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)
    return packed.view(">u8").astype(np.uint64).reshape(len(digits), 2)


def _read_numbers(path: Path, name: str) -> npt.NDArray[Any]:
    return np.concatenate([column.to_numpy(zero_copy_only=False) for column in _usable(path, name)])


def _near(path: Path, first_rows: npt.NDArray[np.int64]) -> tuple[_Groups, npt.NDArray[np.int64]]:
    """Groups of equal perceptual hashes among rows with different pixels, and which rows their numbers mean."""
    columns = list(_usable(path, "perceptual_hash"))
    has_hash = np.concatenate([column.is_valid().to_numpy(zero_copy_only=False) for column in columns])
    hashes = np.concatenate([pc.fill_null(column, 0).to_numpy(zero_copy_only=False) for column in columns])
    rows = first_rows[has_hash[first_rows]]
    return _firsts_and_groups(hashes[rows])[1], rows


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
    of_class = codes[pixels.order]
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
