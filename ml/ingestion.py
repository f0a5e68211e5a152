"""From a source of images to a manifest and a report: every image gets a row, every oddity a line. numpy and pyarrow only, no torch.

What a source is (folders, tar shards, Parquet files, lists) is `ml.sources`' matter.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ml.errors import BadImage, DataError, Interrupted, NoImages, TooFewLabels
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.locations import STORED, forget_all, read_bytes
from ml.manifest import COLUMNS, Kind, Manifest, Share, split
from ml.manifest_files import Row, RowFile, write_manifest
from ml.packing import Packer
from ml.pixels import decode, perceptual_hash, pixel_digest, shrink
from ml.read_ahead import read_many, take
from ml.reports import Counts, build_report
from ml.sources import Format, Source, open_source
from ml.sources.listing import EXAMPLES, Entry, Fingerprints, ListedOnce, Notes

PART_KINDS: dict[str, Kind] = {"test": "evaluation", "validation": "evaluation", "labeled": "labeled", "unlabeled": "unlabeled"}

_CHUNK = 256
# Pillow lets go of the interpreter lock while it decodes; more threads than two would fight over it in between.
_THREADS = 2
_AHEAD = 8 * _THREADS
_LISTED_AT_ONCE = 100_000
"""Entries after which listing shows that it is alive."""


_KEY, _CLASS, _STATUS = (COLUMNS.index(name) for name in ("key", "class_name", "status"))


class _Looked(NamedTuple):
    """What came of one entry."""

    row: Row
    data: bytes | None
    """What is to be packed."""
    is_resized: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """What came of a source."""

    num_images: int
    """Rows of the manifest, the broken files among them."""
    num_usable: int
    class_names: tuple[str, ...]
    report: dict[str, Any]
    """JSON-able."""


def ingest(
    path: str | Path,
    manifest: Path,
    *,
    kind: Kind,
    source_format: Format = "auto",
    split: str | None = None,
    packer: Packer | None = None,
    on_event: OnEvent = ignore,
    should_stop: ShouldStop = never,
) -> Ingested:
    """Read every image of the source at `path` and write its manifest; memory hardly grows with their number.

    With a `packer` the manifest says where in its shards the images lie, else where they lie now.
    Hidden files are left out. Broken files and non-images become rows with their status. Raises NoImages for a missing or
    empty source or a class without a usable image, TooFewLabels for labeled images of one class, DataError for symbolic
    links that lead out of the source, keys that stand twice, and what `ml.sources` refuses.
    """
    source = open_source(path, source_format=source_format, split=split)
    on_event(Event(kind="stage", data={"stage": "ingesting"}))
    counts = Counts()
    with TemporaryDirectory(dir=manifest.parent, prefix=".ingest-") as folder:
        if source.root.is_remote:
            source = ListedOnce(source, Path(folder) / "entries")
        total, notes = _list(source, kind, on_event, should_stop)
        with RowFile(Path(folder) / "rows.parquet") as rows:
            for row in _inspect_all(source, kind, packer, total=total, on_event=on_event, should_stop=should_stop):
                rows.add(row)
                counts.add(row[_KEY], row[_CLASS], row[_STATUS])
        # Sorting and counting need the room.
        forget_all()
        _refuse_unusable(source, path, kind, counts, notes)
        class_names = tuple(sorted(counts.classes))
        write_manifest(rows, manifest, root=str(source.root) if packer is None else STORED, kind=kind, class_names=class_names)
    report = build_report(manifest, kind=kind, counts=counts, notes=notes)
    if packer is not None:
        report["packed"] = packer.report()
    return Ingested(num_images=counts.num_rows, num_usable=counts.statuses["ok"], class_names=class_names, report=report)


def scan(
    root: str | Path,
    *,
    kind: Kind,
    source_format: Format = "auto",
    on_event: OnEvent = ignore,
    should_stop: ShouldStop = never,
) -> tuple[Manifest, dict[str, Any]]:
    """`ingest` into memory: (manifest, report)."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.parquet"
        found = ingest(root, path, kind=kind, source_format=source_format, on_event=on_event, should_stop=should_stop)
        return Manifest.read(path), found.report


def _list(source: Source, kind: Kind, on_event: OnEvent, should_stop: ShouldStop) -> tuple[int, Notes]:
    """How many entries there are, and what is left out; refuses a source that is not whole before anything is decoded."""
    notes, prints, count = Notes(), Fingerprints(), 0
    for entry in source.entries(kind, notes):
        count += 1
        if not source.has_unique_keys:
            prints.add(entry.key)
        if count % _CHUNK == 0 and should_stop():
            raise Interrupted(f"stopped after listing {count} images")
        if count % _LISTED_AT_ONCE == 0:
            on_event(Event(kind="progress", data={"done": 0, "total": count, "unit": "files", "images_per_second": 0.0}))
    if notes.escaping:
        raise DataError(
            f"symbolic links lead out of {source.root}: {', '.join(sorted(notes.escaping)[:10])}; copy the files in or remove the links",
            keys=sorted(notes.escaping)[:EXAMPLES],
        )
    repeated = prints.repeated()
    if repeated:
        _refuse_repeated(source, kind, repeated)
    return count, notes


def _refuse_repeated(source: Source, kind: Kind, repeated: set[int]) -> None:
    seen: dict[str, list[str]] = {}
    for entry in source.entries(kind, Notes()):
        if Fingerprints.of(entry.key) in repeated:
            seen.setdefault(entry.key, []).append(entry.container or entry.key)
    twice = {key: places for key, places in sorted(seen.items()) if len(places) > 1}
    if twice:
        key, places = next(iter(twice.items()))
        message = f"{len(twice)} keys stand more than once, for example {key!r} in {' and '.join(places[:2])}; every image needs its own"
        raise DataError(message, keys=list(twice)[:EXAMPLES])


def _inspect_all(
    source: Source, kind: Kind, packer: Packer | None, *, total: int, on_event: OnEvent, should_stop: ShouldStop
) -> Iterator[Row]:
    started, done = time.monotonic(), 0
    entries = source.entries(kind, Notes())
    with ThreadPoolExecutor(_THREADS) as pool:
        inspector = _Inspector(source, packer, pool)
        while chunk := list(islice(entries, _CHUNK)):
            if should_stop():
                raise Interrupted(f"stopped after {done} of {total} files")
            yield from inspector.inspect(chunk)
            done += len(chunk)
            rate = round(done / max(time.monotonic() - started, 1e-6), 1)
            on_event(Event(kind="progress", data={"done": done, "total": total, "unit": "files", "images_per_second": rate}))
    if packer is not None:
        yield from packer.finish()


class _Inspector:
    """Makes rows of entries, a few images at a time."""

    def __init__(self, source: Source, packer: Packer | None, pool: ThreadPoolExecutor) -> None:
        self._root, self._is_remote = str(source.root), source.root.is_remote
        self._packer, self._pool = packer, pool
        self._side = None if packer is None else packer.packing.resize_shorter_side

    def inspect(self, chunk: list[Entry]) -> Iterator[Row]:
        """The rows, in order; packed ones when their shard is complete."""
        packer = self._packer
        for looked in self._look_at(chunk):
            if packer is None:
                yield looked.row
            else:
                packer.num_resized += looked.is_resized
                yield from packer.add(looked.row, looked.data)

    def _look_at(self, chunk: list[Entry]) -> Iterator[_Looked]:
        locations = [entry.location(self._root) for entry in chunk]
        reads: Iterable[Callable[[], bytes]] = (partial(read_bytes, location) for location in locations)
        if self._is_remote:
            reads = (partial(take, outcome) for outcome in read_many(locations))
        waiting: deque[Future[_Looked]] = deque()
        for entry, read in zip(chunk, reads, strict=True):
            waiting.append(self._pool.submit(self._inspect, entry, read))
            # What was read and waits for a decoder, or is decoded and waits to be packed, must not grow.
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _inspect(self, entry: Entry, read: Callable[[], bytes]) -> _Looked:
        """The row of one image, in the order of the manifest's columns."""
        digest, num_bytes, is_resized = "", entry.length or 0, False
        data: bytes | None = None
        place = entry.container, entry.offset
        try:
            data = read()
            digest, num_bytes = hashlib.sha256(data).hexdigest(), len(data)
            image = decode(data)
            smaller = None if self._side is None else shrink(data, image, self._side)
            if smaller is not None:
                data, image, is_resized = smaller, decode(smaller), True
                digest, num_bytes = hashlib.sha256(data).hexdigest(), len(data)
        except BadImage as error:
            num_bytes = error.details.get("num_bytes", num_bytes)
            row: Row = (entry.key, digest, None, None, entry.class_name, error.status, num_bytes, None, None, *place)
        else:
            facts = pixel_digest(image), perceptual_hash(image), entry.class_name, "ok", num_bytes, image.width, image.height
            row = (entry.key, digest, *facts, *place)
        return _Looked(row, None if self._packer is None else data, is_resized)


PARTS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "unlabeled", "pool"))
"""What folders of a data set's parts are called; a data set whose classes all have such names was given one folder too high."""


def _refuse_unusable(source: Source, path: str | Path, kind: Kind, counts: Counts, notes: Notes) -> None:
    if kind == "unlabeled":
        if not counts.statuses["ok"]:
            raise NoImages(f"{path} holds no usable image among {counts.num_rows} files", **counts.to_dict())
        return
    if notes.classes and notes.classes <= PARTS:
        raise DataError(
            f"the classes of {path} would be {' and '.join(sorted(notes.classes))}: these are parts of a dataset; give one of them",
            classes=sorted(notes.classes),
        )
    if not notes.classes:
        raise NoImages(f"{path} {source.no_classes}", path=str(path))
    empty = sorted(notes.classes - set(counts.classes))
    if empty:
        raise NoImages(
            f"classes without a usable image: {', '.join(empty[:10])}; add images or remove the folders", classes=empty, **counts.to_dict()
        )
    if kind == "labeled" and len(counts.classes) < 2:
        [only] = counts.classes
        raise TooFewLabels(f"{path} has one class only ({only}): at least two are needed", classes=[only])


def find_leakage(evaluation: Sequence[Manifest], others: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Usable images of `evaluation` that also sit in `others`, by file or by pixels; empty is good.

    Each finding names `key` and `evaluation` (its manifest's place), `other_key` and `other`, and `by`: "file" or "pixels".
    Time is linear in all rows together.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    findings = []
    seen: dict[str, tuple[int, str, str]] = {}
    for place, manifest in enumerate(evaluation):
        usable = manifest.usable()
        for key, digest, pixels in zip(usable.column("key"), usable.column("digest"), usable.column("pixel_digest"), strict=True):
            seen.setdefault(pixels, (place, key, digest))
    watched = pa.array(list(seen), pa.string())
    for place, manifest in enumerate(others):
        # Equal files have equal pixels, so one look at the pixels finds both kinds.
        hits = manifest.usable().table
        hits = hits.filter(pc.is_in(hits.column("pixel_digest"), value_set=watched)).select(["key", "digest", "pixel_digest"])
        for hit in hits.to_pylist():
            evaluation_place, key, digest = seen[hit["pixel_digest"]]
            by = "file" if hit["digest"] == digest else "pixels"
            findings.append({"key": key, "evaluation": evaluation_place, "other_key": hit["key"], "other": place, "by": by})
    return findings


def split_folder(manifest: Manifest, shares: Mapping[str, Share], seed: int) -> dict[str, Manifest]:
    """Cut one class-folder manifest into parts named labeled, validation, test, unlabeled, class by class (`ml.manifest.split`).

    Equal pixels stay together, so no part leaks into another; the unlabeled part forgets its classes. Whatever the order
    of `shares`, the parts are the same.
    """
    unknown = sorted(set(shares) - set(PART_KINDS))
    if unknown or manifest.kind == "unlabeled":
        raise DataError(
            f"parts must be among {', '.join(PART_KINDS)} and cut from class folders, got {dict(shares)} of {manifest.kind} images"
        )
    parts = split(manifest, {part: shares[part] for part in PART_KINDS if part in shares}, seed)
    return {part: parts[part].as_kind(PART_KINDS[part]) for part in shares}
