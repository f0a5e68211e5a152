"""The arithmetic of selection: threshold, cap per class, and repeats that fill classes up. Exact, in passes over chunks.

Confidences are half-precision, so that a histogram over their bit patterns is exact: for numbers from 0 to 1 the bits grow
with the value. Memory is classes x bins plus 8 bytes for each row that a tie or a fill must choose among.

Axes: N rows of a chunk, K classes, T bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ml.config import SelectionConfig

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_BLOCK = 1 << 20
_ONE = 0x3C00
"""The bits of 1.0 in half precision."""


class Chunk(NamedTuple):
    """Some rows that may be selected. `hashes(rows)` gives uniform numbers that depend on the rows' keys only."""

    classes: Ints
    confidences: npt.NDArray[np.float16]
    hashes: Callable[[Ints], Hashes]


class Tally(NamedTuple):
    """Some rows that were counted before: how many have this class and this confidence."""

    classes: Ints
    confidences: npt.NDArray[np.float16]
    counts: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """What `decide` found out and `pick` obeys."""

    low_K: Ints
    """Lowest confidence, as bits, that the class's threshold lets pass."""
    high: int
    """One above the highest."""
    target: int | None
    """Rows each class is cut down and filled up to; None does neither."""
    passed_K: Ints
    """Images above the threshold."""
    kept_K: Ints
    """Images that stay under the cap."""
    base_K: Ints
    """Times that each of them stands in the stream at least."""
    cut_K: Ints
    """Bits: above it all are kept, at it some when a hash decides."""
    chosen_by_hash_K: Ints
    """How many images the hash chooses: of those at the cut to be kept, or of all kept to stand in once more."""
    hash_K: Hashes
    """The largest hash chosen."""
    equal_K: Ints
    """How many with exactly that hash are chosen: the first in key order."""
    capped_K: npt.NDArray[np.bool_]
    histogram_K20: Ints
    """All rows by confidence, before the threshold, in 20 equal bins."""
    best_K: npt.NDArray[np.float16]

    def fresh_ties(self) -> Ints:
        """The state that `pick` counts down over the chunks of one pass."""
        return self.equal_K.copy()

    def best_confidence_K(self) -> list[float]:
        """The highest confidence of each class; 0 where there is none."""
        return [float(value) for value in self.best_K]

    def describe(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """JSON-able counts per class."""
        rows_K = self.kept_K * self.base_K + np.where(self.capped_K, 0, self.chosen_by_hash_K)
        cuts = self.cut_K.astype(np.uint16).view(np.float16)
        return [
            {
                "name": name,
                "predicted": int(self.histogram_K20[k].sum()),
                "above_threshold": int(self.passed_K[k]),
                "num_unique": int(self.kept_K[k]),
                "num_rows": int(rows_K[k]),
                "lowest_confidence": float(cuts[k]) if self.kept_K[k] else None,
                "best_confidence": float(self.best_K[k]),
            }
            for k, name in enumerate(class_names)
        ]


def decide(
    chunks: Callable[[], Iterator[Chunk]],
    config: SelectionConfig,
    class_names: Sequence[str],
    *,
    tallies: Callable[[], Iterator[Chunk | Tally]] | None = None,
) -> Balance:
    """Count all chunks, then fix each class's cut and repeats. `chunks()` is called twice and must give the same rows.

    `tallies()`, where it is given, is counted instead, and must stand for the same rows.
    """
    num_classes = len(class_names)
    low_K = np.array([_bits(config.min_confidence_of.get(name, config.min_confidence)) for name in class_names], dtype=np.int64)
    low = int(low_K.min())
    high = _ONE + 1 if config.max_confidence is None else _bits(config.max_confidence)
    histogram_KT = np.zeros((num_classes, max(1, high - low)), dtype=np.int64)
    histogram_K20 = np.zeros((num_classes, 20), dtype=np.int64)
    best_K = np.zeros(num_classes, dtype=np.float16)
    for part in (tallies or chunks)():
        counts_N = part.counts if isinstance(part, Tally) else np.ones(len(part.classes), dtype=np.int64)
        coarse_N = np.minimum(19, (part.confidences.astype(np.float32) * 20).astype(np.int64))
        np.add.at(histogram_K20, (part.classes, coarse_N), counts_N)
        np.maximum.at(best_K, part.classes, part.confidences)
        rows, bits = _passing(part, low_K, high)
        np.add.at(histogram_KT, (part.classes[rows], bits - low), counts_N[rows])
    passed_K = histogram_KT.sum(1)
    target = _target(config, passed_K)
    kept_K = passed_K if target is None else np.minimum(passed_K, target)
    cut_K, needed_K = _cuts(histogram_KT, kept_K, low)
    capped_K = passed_K > kept_K
    base_K, extra_K = _repeats(config, kept_K, target)
    chosen_K = np.where(capped_K, needed_K, extra_K)
    hash_K, equal_K = _hash_limits(chunks(), (low_K, high), cut_K, capped_K, chosen_K)
    return Balance(low_K, high, target, passed_K, kept_K, base_K, cut_K, chosen_K, hash_K, equal_K, capped_K, histogram_K20, best_K)


def pick(chunk: Chunk, balance: Balance, equals_K: Ints) -> tuple[Ints, Ints]:
    """The chunk's rows that are kept, and how often each stands in the stream. Counts `equals_K` down."""
    rows, bits = _passing(chunk, balance.low_K, balance.high)
    classes = chunk.classes[rows]
    stays = bits >= balance.cut_K[classes]
    rows, bits, classes = rows[stays], bits[stays], classes[stays]
    asked = np.flatnonzero(_asks_hash(bits, classes, balance.cut_K, balance.capped_K, balance.chosen_by_hash_K))
    chosen = np.zeros(len(rows), dtype=bool)
    hashes, limits = chunk.hashes(rows[asked]), balance.hash_K[classes[asked]]
    chosen[asked] = hashes < limits
    for place in asked[hashes == limits]:
        chosen[place] = equals_K[classes[place]] > 0
        equals_K[classes[place]] -= 1
    capped = balance.capped_K[classes]
    repeats = balance.base_K[classes] + (chosen & ~capped)
    kept = ~capped | (bits > balance.cut_K[classes]) | chosen
    return rows[kept], repeats[kept]


def select_rows(
    classes: Ints,
    confidences: npt.NDArray[np.float16],
    hashes: Hashes,
    config: SelectionConfig,
    class_names: Sequence[str],
    *,
    chunk_size: int = 1 << 20,
) -> tuple[Ints, Ints]:
    """`decide` and `pick` on arrays of all rows: (rows that are kept, their repeats)."""

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(classes), chunk_size):
            part = slice(start, start + chunk_size)
            of_part = hashes[part]
            yield Chunk(classes[part].astype(np.int64), confidences[part], of_part.__getitem__)

    balance = decide(chunks, config, class_names)
    equals_K = balance.fresh_ties()
    rows, repeats = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, chunk in enumerate(chunks()):
        kept, times = pick(chunk, balance, equals_K)
        rows.append(kept + number * chunk_size)
        repeats.append(times)
    return np.concatenate(rows), np.concatenate(repeats)


def _bits(confidence: float) -> int:
    return int(np.float16(confidence).view(np.uint16))


def _passing(chunk: Chunk | Tally, low_K: Ints, high: int) -> tuple[Ints, Ints]:
    bits_N = chunk.confidences.view(np.uint16)
    rows = np.flatnonzero((bits_N >= low_K[chunk.classes]) & (bits_N < high))
    return rows, bits_N[rows].astype(np.int64)


def _target(config: SelectionConfig, passed_K: Ints) -> int | None:
    if config.cap_per_class == "none":
        return None
    return int(passed_K.max(initial=0)) if config.cap_per_class == "largest-class" else int(config.cap_per_class)


def _cuts(histogram_KT: Ints, kept_K: Ints, low: int) -> tuple[Ints, Ints]:
    """Per class the bits of the least confident image kept, and how many exactly there are kept."""
    num_classes, num_bins = histogram_KT.shape
    at_or_above_KT = histogram_KT[:, ::-1].cumsum(1)[:, ::-1]
    # The highest bin with at least kept_K images at or above it.
    enough_KT = at_or_above_KT >= np.maximum(kept_K, 1)[:, None]
    bins_K = np.where(kept_K > 0, num_bins - 1 - enough_KT[:, ::-1].argmax(1), 0)
    above_K = at_or_above_KT[np.arange(num_classes), bins_K] - histogram_KT[np.arange(num_classes), bins_K]
    return bins_K + low, kept_K - above_K


def _repeats(config: SelectionConfig, kept_K: Ints, target: int | None) -> tuple[Ints, Ints]:
    if target is None or not config.balance:
        return np.ones_like(kept_K), np.zeros_like(kept_K)
    filled_K = np.minimum(target, kept_K * config.max_repeat)
    base_K = filled_K // np.maximum(kept_K, 1)
    return base_K, filled_K - base_K * kept_K


def _asks_hash(bits: Ints, classes: Ints, cut_K: Ints, capped_K: npt.NDArray[np.bool_], chosen_K: Ints) -> npt.NDArray[np.bool_]:
    """A class is either cut down, and the hash chooses at the cut, or filled up, and it chooses among all."""
    return np.asarray((chosen_K[classes] > 0) & (~capped_K[classes] | (bits == cut_K[classes])))


def _hash_limits(
    chunks: Iterator[Chunk], span: tuple[Ints, int], cut_K: Ints, capped_K: npt.NDArray[np.bool_], chosen_K: Ints
) -> tuple[Hashes, Ints]:
    hash_K, equal_K = np.zeros(len(cut_K), dtype=np.uint64), np.zeros(len(cut_K), dtype=np.int64)
    if not chosen_K.any():
        return hash_K, equal_K
    asked = _Asked(len(cut_K))
    for chunk in chunks:
        rows, bits = _passing(chunk, *span)
        classes = chunk.classes[rows]
        places = _asks_hash(bits, classes, cut_K, capped_K, chosen_K)
        asked.add(classes[places], chunk.hashes(rows[places]))
    for k in np.flatnonzero(chosen_K):
        of_class = asked.of_class(int(k))
        limit = np.partition(of_class, chosen_K[k] - 1)[chosen_K[k] - 1]
        hash_K[k] = limit
        equal_K[k] = chosen_K[k] - (of_class < limit).sum()
    return hash_K, equal_K


class _Asked:
    """Hashes by class: 8 bytes each and never all of them twice, so they are sorted by class block by block as they come."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._waiting: list[tuple[Ints, Hashes]] = []
        self._num_waiting = 0
        self._blocks: list[tuple[Hashes, Ints]] = []

    def add(self, classes: Ints, hashes: Hashes) -> None:
        self._waiting.append((classes, hashes))
        self._num_waiting += len(classes)
        if self._num_waiting >= _BLOCK:
            self._sort()

    def of_class(self, k: int) -> Hashes:
        """Every hash of class k, in a copy."""
        self._sort()
        return np.concatenate([np.zeros(0, np.uint64), *(hashes[ends[k] : ends[k + 1]] for hashes, ends in self._blocks)])

    def _sort(self) -> None:
        """Close the block. Its hashes of class k lie from ends[k] to ends[k + 1]."""
        if not self._waiting:
            return
        classes, hashes = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        ends = np.concatenate([[0], np.bincount(classes, minlength=self._num_classes).cumsum()])
        self._blocks.append((hashes[np.argsort(classes, kind="stable")], ends))
        self._waiting, self._num_waiting = [], 0
