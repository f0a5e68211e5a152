"""Which of a teacher's guesses the student sees, and how often: label shards in, selected pseudo-labels out.

Exact, and the same rows whatever the number and order of the shards. The core that decides is `ml.balance`; here are files,
duplicates of evaluation images, refusals and the report. numpy and pyarrow only, no torch.

The output is Parquet sorted by key: `key`, `class`, `confidence`, `repeat` (times the image stands in the student's stream)
and the probability columns of `ml.pseudo_labels`. Its report lies beside it as `<output>.json`.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.balance import Balance, Chunk, Tally, decide, pick
from ml.determinism import keyed_hashes
from ml.duplicates import find_duplicates
from ml.errors import ClassMismatch, DataError, Interrupted, NothingSelected, PoolTooSmall
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.files import write_bytes, written_aside
from ml.manifest import Manifest, count_rows
from ml.pseudo_labels import METADATA, PROBABILITY_COLUMNS, dense_probs, read_facts, read_histogram, read_shard
from ml.self_training import check_thresholds
from ml.tasks import SelectionTask

_CHOICE = ("key", "status", "class", "confidence")
_EXAMPLES = 100


@dataclass(frozen=True, slots=True, eq=False)
class SelectedLabels:
    """Selected pseudo-labels in memory, n rows sorted by key."""

    classes: npt.NDArray[np.int64]
    repeats: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    table: pa.Table

    @classmethod
    def read(cls, path: str | Path) -> SelectedLabels:
        """Open what `select` wrote; DataError when it is absent or damaged."""
        class_names = tuple(read_facts(path)["class_names"])
        table = read_shard(path).combine_chunks()
        classes, repeats = (table.column(name).to_numpy().astype(np.int64) for name in ("class", "repeat"))
        return cls(classes, repeats, class_names, table)

    def __len__(self) -> int:
        return len(self.repeats)

    def keys(self) -> pa.Array:
        """The images' keys in the pool."""
        return self.table.column("key").combine_chunks()

    def num_rows(self) -> int:
        """Rows of the student's stream: repeats counted."""
        return int(self.repeats.sum())

    def soft(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The teacher's distributions for these rows, [len(rows), K], each summing to 1."""
        return dense_probs(self.table.take(pa.array(rows)), len(self.class_names))


def select(task: SelectionTask, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> dict[str, Any]:
    """Choose, balance and write `task.output`; the report that is also written beside it.

    Raises NothingSelected (with the histogram) when nothing, or nothing of a class that must be there, survives,
    PoolTooSmall when the cap exceeds the usable pool, DataError when the shards do not cover the pool exactly once.
    """
    check_thresholds(task.selection, task.class_names)
    on_event(Event(kind="stage", data={"stage": "selecting"}))
    reader = _Shards(task.shards, task.class_names, on_event, should_stop)
    if reader.num_rows != (num_pool := count_rows(task.unlabeled)):
        raise DataError(f"the shards label {reader.num_rows} images, the pool has {num_pool}: label the rest first")
    report: dict[str, Any] = {"num_pool": num_pool}
    kept = None if task.keep_keys_of is None else SelectedLabels.read(task.keep_keys_of)
    if kept is not None:
        parts = _labels_of(_Chosen(kept.keys(), kept.repeats), reader)
    else:
        voters = _Shards(task.selection_shards, task.class_names, on_event, should_stop) if task.selection_shards else reader
        vote = _Vote(task, voters)
        report |= vote.report()
        parts = _labels_of(vote.chosen(), reader) if task.selection_shards else vote.picked(None)
    with written_aside(Path(task.output)) as aside:
        report |= _write(aside, parts, task.class_names)
        if kept is not None:
            report["num_missing"] = len(kept) - report["num_unique"]
        # The table comes last: whoever finds it finds a finished selection.
        write_bytes(Path(f"{task.output}.json"), json.dumps(report, indent=1, allow_nan=False).encode())
    return report


class _Shards:
    """Label shards in the order of their keys, whatever order they were named in."""

    def __init__(self, paths: Sequence[str], class_names: Sequence[str], on_event: OnEvent, should_stop: ShouldStop) -> None:
        self._on_event, self._should_stop = on_event, should_stop
        spans = []
        self.num_rows = 0
        self._sizes: dict[str, int] = {}
        for path in paths:
            if (found := read_facts(path)["class_names"]) != list(class_names):
                raise ClassMismatch(f"{path} labels {len(found)} classes, the run has others", known=list(class_names), found=found)
            keys = read_shard(path, ["key"]).column("key")
            if len(keys):
                spans.append((keys[0].as_py(), keys[-1].as_py(), path))
                self.num_rows += len(keys)
                self._sizes[path] = len(keys)
        spans.sort()
        for (_, last, before), (first, _, after) in pairwise(spans):
            if first <= last:
                raise DataError(f"the shards {before} and {after} label the same images")
        self.spans = spans
        """First key, last key and path of each."""

    def tell(self, done: int) -> None:
        """Report how many rows are done."""
        self._on_event(Event(kind="progress", data={"done": done, "total": self.num_rows, "unit": "rows"}))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Each shard's rows with a guess; Interrupted when asked to stop."""
        for _, _, path in self.walk():
            yield self.read(path, columns)

    def walk(self) -> Iterator[tuple[str, str, str]]:
        """First key, last key and path of each shard, telling what is done; Interrupted when asked to stop."""
        done = 0
        for span in self.spans:
            if self._should_stop():
                raise Interrupted(f"stopped selecting after {done} of {self.num_rows} rows")
            yield span
            done += self._sizes[span[2]]
            self.tell(done)

    def read(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard's rows with a guess."""
        table = read_shard(path, columns)
        return table.filter(pc.equal(table.column("status"), "ok"))


@dataclass(frozen=True, slots=True, eq=False)
class _Chosen:
    """Keys, sorted, and how often each stands in the stream."""

    keys: pa.Array
    repeats: npt.NDArray[np.int64]

    def window(self, first: str, last: str) -> tuple[int, pa.Array]:
        """Where the keys from `first` to `last` begin, and those keys."""
        places = range(len(self.keys))
        start = bisect_left(places, first, key=lambda place: str(self.keys[place].as_py()))
        stop = bisect_right(places, last, key=lambda place: str(self.keys[place].as_py()))
        return start, self.keys.slice(start, stop - start)


class _Vote:
    """The guesses whose classes and confidences choose: the teacher's, or those of a separate selection model."""

    def __init__(self, task: SelectionTask, voters: _Shards) -> None:
        self._task, self._voters = task, voters
        config = task.selection
        evaluation = [Manifest.read(path) for path in task.evaluation]
        self._duplicates = find_duplicates(task.unlabeled, evaluation, config.near_duplicate_distance, on_rows=voters.tell)
        self._removed = pa.array(sorted(self._duplicates.equal | self._duplicates.near), pa.string())
        self._num_usable = sum(self._count_usable(path) for _, _, path in voters.walk())
        if isinstance(config.cap_per_class, int) and config.cap_per_class > self._num_usable:
            raise PoolTooSmall(
                f"cap_per_class {config.cap_per_class} exceeds the {self._num_usable} usable images of the pool: "
                "lower it or take largest-class",
                cap_per_class=config.cap_per_class,
                num_usable=self._num_usable,
            )
        self._balance = decide(
            lambda: (self._chunk(table) for table in self._eligible(_CHOICE)), config, task.class_names, tallies=self._tallies
        )
        _refuse_nothing(self._balance, task)

    def report(self) -> dict[str, Any]:
        """JSON-able: what was there, what was removed, what each class keeps."""
        equal, near = self._duplicates
        return {
            "num_usable": self._num_usable,
            "num_eligible": int(self._balance.histogram_K20.sum()),
            "removed_duplicates": {"equal": len(equal), "near": len(near), "examples": sorted(equal | near)[:_EXAMPLES]},
            "target": self._balance.target,
            "classes": self._balance.describe(self._task.class_names),
            "histogram": _histogram(self._balance, self._task.class_names),
        }

    def picked(self, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        """Each shard's chosen rows with their column `repeat`."""
        equals = self._balance.fresh_ties()
        for table in self._eligible(columns):
            rows, repeats = pick(self._chunk(table), self._balance, equals)
            yield _with_repeats(table.take(pa.array(rows)), repeats)

    def chosen(self) -> _Chosen:
        """Everything chosen, without labels."""
        table = pa.concat_tables(list(self.picked(_CHOICE)))
        return _Chosen(table.column("key").combine_chunks(), table.column("repeat").to_numpy().astype(np.int64))

    def _eligible(self, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        for table in self._voters.tables(columns):
            yield self._allow(table)

    def _allow(self, table: pa.Table) -> pa.Table:
        allowed_N = _allowed(table.column("key"), self._removed, self._task.selection.sample_ratio, self._task.seed)
        return table.filter(pa.array(allowed_N))

    def _count_usable(self, path: str) -> int:
        histogram = read_histogram(path)
        return self._voters.read(path, ("status",)).num_rows if histogram is None else int(histogram[2].sum())

    def _tallies(self) -> Iterator[Chunk | Tally]:
        """What whoever labeled a shard counted; its rows, where that is not told or where not all of them may be selected."""
        removed = self._removed.to_pylist()
        for first, last, path in self._voters.walk():
            is_whole = self._task.selection.sample_ratio == 1 and bisect_left(removed, first) == bisect_right(removed, last)
            histogram = read_histogram(path) if is_whole else None
            if histogram is None:
                yield self._chunk(self._allow(self._voters.read(path, _CHOICE)))
            else:
                yield Tally(*histogram)

    def _chunk(self, table: pa.Table) -> Chunk:
        keys, seed = table.column("key"), self._task.seed
        return Chunk(
            table.column("class").to_numpy().astype(np.int64),
            table.column("confidence").to_numpy(),
            lambda rows: keyed_hashes(keys.take(pa.array(rows)).to_pylist(), seed, "selection"),
        )


def _allowed(keys: pa.ChunkedArray, removed: pa.Array, sample_ratio: float, seed: int) -> npt.NDArray[np.bool_]:
    allowed_N = np.ones(len(keys), dtype=bool)
    if len(removed):
        allowed_N = ~pc.is_in(keys, value_set=removed).to_numpy()
    if sample_ratio < 1:
        allowed_N &= keyed_hashes(keys.to_pylist(), seed, "sample") < np.uint64(int(sample_ratio * 2**64))
    return cast(npt.NDArray[np.bool_], allowed_N)


def _histogram(balance: Balance, class_names: Sequence[str]) -> dict[str, Any]:
    """Eligible images by confidence, before the threshold: 20 equal bins from 0 to 1, per predicted class."""
    counts = {name: row.tolist() for name, row in zip(class_names, balance.histogram_K20, strict=True)}
    return {"edges": [round(edge / 20, 2) for edge in range(21)], "counts": counts}


def _refuse_nothing(balance: Balance, task: SelectionTask) -> None:
    names = [name for name, kept in zip(task.class_names, balance.kept_K, strict=True) if kept == 0]
    if not names or (len(names) < len(task.class_names) and not task.selection.require_every_class):
        return
    best_K = balance.best_confidence_K()
    best = {name: best_K[task.class_names.index(name)] for name in names}
    reachable = [confidence for confidence in best.values() if confidence > 0]
    if len(names) == len(task.class_names):
        what, level = "no image", max(reachable, default=0.0)
    else:
        what, level = f"no image of {', '.join(names[:10])}", min(reachable, default=0.0)
    if reachable and task.selection.max_confidence is not None and level >= task.selection.min_confidence:
        advice = f"raise max_confidence from {task.selection.max_confidence}, or leave it out"
    elif reachable:
        advice = f"lower min_confidence from {task.selection.min_confidence} to {level:.3g} or less, or train the teacher better"
    else:
        advice = "the teacher predicts none there: train it better or enlarge the pool"
    if len(names) < len(task.class_names):
        advice += ", or switch require_every_class off"
    raise NothingSelected(
        f"{what} survives selection; {advice}",
        classes=names,
        best_confidence=best,
        histogram=_histogram(balance, task.class_names),
    )


def _labels_of(chosen: _Chosen, shards: _Shards) -> Iterator[pa.Table]:
    """The chosen rows with the labels and probabilities of these shards."""
    for table in shards.tables():
        keys = table.column("key").combine_chunks()
        # Shards and chosen keys are sorted alike, so only the window that can meet is compared.
        start, window = chosen.window(keys[0].as_py(), keys[-1].as_py()) if len(keys) else (0, chosen.keys[:0])
        places = pc.index_in(keys, value_set=window)
        repeats = chosen.repeats[start + places.drop_null().to_numpy().astype(np.int64)]
        yield _with_repeats(table.filter(pc.is_valid(places)), repeats)


def _with_repeats(table: pa.Table, repeats: npt.NDArray[np.int64]) -> pa.Table:
    return table.append_column("repeat", pa.array(repeats.astype(np.int32), pa.int32()))


def _write(path: Path, parts: Iterator[pa.Table], class_names: Sequence[str]) -> dict[str, Any]:
    """Write the parts one after another; counts for the report."""
    labels_K = np.zeros(len(class_names), dtype=np.int64)
    num_unique = num_rows = 0
    metadata = {METADATA: json.dumps({"class_names": list(class_names)})}
    writer = None
    try:
        for part in parts:
            names = ("key", "class", "confidence", "repeat", "agreement", *PROBABILITY_COLUMNS)
            table = part.select([name for name in names if name in part.column_names]).replace_schema_metadata(metadata)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
            if table.num_rows:
                writer.write_table(table)
            repeats = table.column("repeat").to_numpy()
            num_unique, num_rows = num_unique + len(repeats), num_rows + int(repeats.sum())
            labels_K += np.bincount(table.column("class").to_numpy(), minlength=len(labels_K))
    finally:
        if writer is not None:
            writer.close()
    if num_unique == 0:
        raise NothingSelected("none of the images that were to be kept has a label now", histogram={})
    return {"num_unique": num_unique, "num_rows": num_rows, "labels": dict(zip(class_names, labels_K.tolist(), strict=True))}
