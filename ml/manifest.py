"""Manifests: which images a dataset version holds, one row per file, in Parquet.

A manifest never changes. Rows are sorted by `key`, a POSIX path. Images stay where they are, below `root`: a
folder, `s3://…`, or `stored:` for those that were packed.

    key              str         unique
    digest           str         SHA-256 of the file, hex; empty when the file could not be read
    pixel_digest     str|null    SHA-256 over "WxH:" and the RGB bytes, hex; null unless the status is ok
    perceptual_hash  uint64|null difference hash of the gray image; null unless the status is ok
    class_name       str|null    null for unlabeled images
    status           str         "ok" or why the file is no image, one of `ml.pixels.STATUSES`
    bytes            int64       size of the file
    width, height    int32|null  after EXIF rotation; null unless the status is ok

Where the bytes lie is no fact of the image and not part of the digest:

    container        str|null    path below `root` of the file that holds the image; null: the key is the path of its own file
    offset           int64|null  where in the container: first byte in a tar file, row in a Parquet file; null: all of it
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ml.errors import ClassMismatch, DataError, TooFewLabels
from ml.files import written_aside
from ml.locations import Location, resolve_root
from ml.objects import is_address

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["labeled", "unlabeled", "evaluation"]
Share = float | Literal["rest"]
"""Of one part of a split: a share of each class below 1, a whole number of images of each class, or what the others leave."""

COLUMNS = ("key", "digest", "pixel_digest", "perceptual_hash", "class_name", "status", "bytes", "width", "height")
"""The facts; two manifests that agree in them are of the same images."""
LOCATION_COLUMNS = ("container", "offset")

BATCH_ROWS = 65536
"""Of a row group, and of one step of the digest."""


def schema() -> pa.Schema:
    """Of a manifest's table."""
    # pyarrow costs 40 MB and is imported on first use, so that the API starts without it.
    import pyarrow as pa

    types = {
        "perceptual_hash": pa.uint64(),
        "bytes": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "offset": pa.int64(),
    }
    required = ("key", "digest", "status", "bytes")
    return pa.schema(
        [pa.field(name, types.get(name, pa.string()), nullable=name not in required) for name in (*COLUMNS, *LOCATION_COLUMNS)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """An immutable list of images below `root`; `table` is a pyarrow.Table with the columns above."""

    root: str
    kind: Kind
    class_names: tuple[str, ...]
    """Sorted; empty when unlabeled."""
    table: pa.Table

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], *, root: str | Path, kind: Kind) -> Manifest:
        """Sort `rows` (dicts with all COLUMNS, and where that is needed LOCATION_COLUMNS) into a manifest.

        Class names are those of the usable rows.
        """
        import pyarrow as pa

        ordered = sorted(rows, key=lambda row: cast(str, row["key"]))
        for before, after in pairwise(ordered):
            if before["key"] == after["key"]:
                raise DataError(f"the key {after['key']!r} stands twice in one manifest", key=after["key"])
        names = {row["class_name"] for row in ordered if row["class_name"] is not None and row["status"] == "ok"}
        columns = {name: [row[name] for row in ordered] for name in COLUMNS}
        columns |= {name: [row.get(name) for row in ordered] for name in LOCATION_COLUMNS}
        return cls(str(root), kind, tuple(sorted(names)), pa.table(columns, schema=schema()))

    @classmethod
    def read(cls, path: str | Path, *, start: int = 0, stop: int | None = None) -> Manifest:
        """Open the manifest at `path`, or only its rows from `start` up to, not including, `stop`.

        DataError when it is absent, damaged or something else.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                table = _read_rows(file, start, file.metadata.num_rows if stop is None else stop)
            facts = json.loads((table.schema.metadata or {})[b"manifest"])
            for name in LOCATION_COLUMNS:
                # Manifests of folders used to do without.
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(len(table)))
            table = table.replace_schema_metadata(None).cast(schema())
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise DataError(f"{path} is not a readable manifest: {error}", path=str(path)) from error
        return cls(facts["root"], facts["kind"], tuple(facts["class_names"]), table)

    def write(self, path: str | Path) -> None:
        """Write Parquet to `path`, whole or not at all; equal manifests give equal bytes."""
        import pyarrow.parquet as pq

        table = self.table.replace_schema_metadata(metadata_of(self.root, self.kind, self.class_names))
        with written_aside(Path(path)) as aside:
            pq.write_table(table.combine_chunks(), aside, compression="zstd", row_group_size=BATCH_ROWS)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> list[Any]:
        """All values of one column, as Python objects."""
        return cast(list[Any], self.table.column(name).to_pylist())

    def rows(self, start: int, stop: int) -> Manifest:
        """The rows from `start` up to, not including, `stop`."""
        return self._with(self.table.slice(start, max(0, stop - start)))

    def take(self, indices: Sequence[int]) -> Manifest:
        """The rows at `indices`, in that order."""
        import pyarrow as pa

        return self._with(self.table.take(pa.array(indices, type=pa.int64())))

    def usable(self) -> Manifest:
        """The rows whose file is a readable image."""
        import pyarrow.compute as pc

        return self._with(self.table.filter(pc.equal(self.table.column("status"), "ok")))

    def locations(self) -> list[Location]:
        """Where every row's bytes lie."""
        # A Path object each costs 3 µs, a thirtieth of decoding a small image.
        root = resolve_root(self.root)
        is_remote = is_address(root)
        lengths = self.column("bytes")
        if not is_remote and self.table.column("container").null_count == len(self):
            return [Location(os.path.join(root, key), None, length) for key, length in zip(self.column("key"), lengths, strict=True)]
        columns = (self.column(name) for name in ("key", "container", "offset", "digest"))
        return [
            Location(os.path.join(root, container or key), offset, length, digest if is_remote or offset is not None else None)
            for key, container, offset, digest, length in zip(*columns, lengths, strict=True)
        ]

    def class_indices(self, class_names: Sequence[str]) -> list[int]:
        """Each row's place in `class_names`; ClassMismatch when a row has a class that is not there, or none."""
        index = {name: i for i, name in enumerate(class_names)}
        labels = self.column("class_name")
        foreign = sorted({str(name) for name in labels if name not in index})
        if foreign:
            raise ClassMismatch(
                f"classes {', '.join(foreign[:10])} are not among the {len(index)} known: {', '.join(list(index)[:10])}",
                unknown=foreign,
                known=list(index),
            )
        return [index[name] for name in labels]

    def digest(self) -> str:
        """SHA-256, hex, over kind, classes and all rows; the same wherever and in whatever the images lie."""

        def batches(name: str) -> Iterator[pa.ChunkedArray]:
            column = self.table.column(name)
            return (column.slice(start, BATCH_ROWS) for start in range(0, len(self), BATCH_ROWS))

        return _digest(self.kind, self.class_names, batches)

    def unlabeled(self) -> Manifest:
        """The same images as a pool: their classes forgotten."""
        import pyarrow as pa

        at = COLUMNS.index("class_name")
        return Manifest(self.root, "unlabeled", (), self.table.set_column(at, "class_name", pa.nulls(len(self), pa.string())))

    def as_kind(self, kind: Kind) -> Manifest:
        """The same rows under another kind."""
        return self.unlabeled() if kind == "unlabeled" else Manifest(self.root, kind, self.class_names, self.table)

    def _with(self, table: pa.Table) -> Manifest:
        return Manifest(self.root, self.kind, self.class_names, table)


def _read_rows(file: Any, start: int, stop: int) -> pa.Table:
    """Rows of an open Parquet file; only the row groups that hold them are read, so a shard of a large pool stays cheap."""
    groups, before, first = [], 0, 0
    for group in range(file.num_row_groups):
        behind = first + file.metadata.row_group(group).num_rows
        if behind <= start:
            before = behind
        elif first < stop:
            groups.append(group)
        first = behind
    return file.read_row_groups(groups).slice(start - before, max(0, stop - start))


def count_rows(path: str | Path) -> int:
    """Number of rows of the manifest at `path`, without reading them."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def read_batches(path: str | Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a manifest, a bounded number of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Buffering ahead holds all columns of all row groups at once.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def digest_of(path: str | Path) -> str:
    """`Manifest.digest` of the manifest at `path`, in memory that does not grow with it."""
    facts = read_facts(path)
    return _digest(facts["kind"], facts["class_names"], lambda name: (batch.column(name) for batch in read_batches(path, [name])))


def read_facts(path: str | Path) -> dict[str, Any]:
    """`root`, `kind` and `class_names` of the manifest at `path`, without its rows."""
    import pyarrow.parquet as pq

    found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"manifest"])
    return found


def metadata_of(root: str | Path, kind: Kind, class_names: Sequence[str]) -> dict[str, str]:
    """What `read_facts` reads, for the schema of a file."""
    return {"manifest": json.dumps({"root": str(root), "kind": kind, "class_names": list(class_names)}, sort_keys=True)}


def _digest(kind: Kind, class_names: Sequence[str], batches: Callable[[str], Iterable[pa.ChunkedArray]]) -> str:
    running = hashlib.sha256(json.dumps([kind, class_names]).encode())
    for name in COLUMNS:
        for batch in batches(name):
            running.update(json.dumps(batch.to_pylist()).encode())
    return running.hexdigest()


def split_validation(manifest: Manifest, ratio: float, seed: int) -> tuple[Manifest, Manifest]:
    """Cut `ratio` of each class's usable images off for validation: (training, validation).

    An image's side depends on the seed and its pixels only, so equal pixels never sit on both. Every class keeps at least
    one image on either side; TooFewLabels when a class has fewer than two different ones.
    """
    parts = split(manifest, {"validation": ratio, "training": 1 - ratio}, seed)
    return parts["training"], parts["validation"]


def split(manifest: Manifest, shares: Mapping[str, Share], seed: int) -> dict[str, Manifest]:
    """Cut the usable images of each class into named parts; what is left beyond them is in none.

    A share below 1 is that share of each class, a whole number from 1 on is that many images of each class, and "rest" is what
    the other parts leave. Equal pixels stay together. Every part has an image of every class; TooFewLabels when a class has
    too few for that.
    """
    _check_shares(shares)
    usable = manifest.usable()
    part_of: dict[str, str] = {}
    members: dict[str, list[int]] = {name: [] for name in shares}
    rows_of_class: dict[str, list[int]] = {}
    for row, name in enumerate(usable.column("class_name")):
        rows_of_class.setdefault(str(name), []).append(row)
    pixels = usable.column("pixel_digest")
    for class_name in sorted(rows_of_class):
        cut = _cut_class(class_name, rows_of_class[class_name], pixels, shares, seed)
        for part, rows in cut.items():
            for row in rows:
                # Pixels that stand under two classes go where the first class put them: no digest in two parts.
                members[part_of.setdefault(pixels[row], part)].append(row)
    parts = {part: usable.take(sorted(rows)) for part, rows in members.items()}
    for part, of_part in parts.items():
        missing = sorted(set(rows_of_class) - {str(name) for name in of_part.column("class_name")})
        if missing:
            raise TooFewLabels(f"the {part} part would have no image of {', '.join(missing[:10])}", part=part, classes=missing)
    return parts


def check_shares_fit(num_images: Mapping[str, int], shares: Mapping[str, Share]) -> None:
    """DataError or TooFewLabels when `shares` cannot be cut from classes of these sizes, duplicates counted as different images."""
    _check_shares(shares)
    for class_name, number in num_images.items():
        _images_wanted(class_name, number, shares)


def _check_shares(shares: Mapping[str, Any]) -> None:
    numbers = [share for share in shares.values() if share != "rest"]
    wrong = [share for share in numbers if isinstance(share, str) or share <= 0 or (share > 1 and share != int(share))]
    fractions = [share for share in numbers if not isinstance(share, str) and share < 1]
    # 1.0 alone is the whole; the whole number 1 is one image of each class.
    if not shares or wrong or len(shares) - len(numbers) > 1 or sum(fractions) > 1 + 1e-9:
        raise DataError(
            f'shares {dict(shares)} must be shares below 1 (at most 1 together), whole numbers of images per class, or "rest" for one part'
        )


def _images_wanted(class_name: str, num_images: int, shares: Mapping[str, Share]) -> dict[str, float]:
    """How many images of a class each part is to get."""
    wanted = {
        part: float(share) * num_images if share < 1 else float(share) for part, share in shares.items() if not isinstance(share, str)
    }
    left = num_images - sum(wanted.values())
    if left < -1e-6:
        raise TooFewLabels(
            f"class {class_name!r} has {num_images} different usable images, "
            f"{' and '.join(f'{part} {share}' for part, share in shares.items())} asks for more",
            class_name=class_name,
            num_images=num_images,
        )
    return {part: wanted.get(part, left) for part in shares}


def _cut_class(class_name: str, rows: list[int], pixels: list[str], shares: Mapping[str, Share], seed: int) -> dict[str, list[int]]:
    key = seed.to_bytes(8, "little")

    def place(row: int) -> tuple[bytes, str]:
        return hashlib.blake2b(pixels[row].encode(), digest_size=8, key=key).digest(), pixels[row]

    groups = [list(group) for _, group in groupby(sorted(rows, key=place), key=place)]
    if len(groups) < len(shares):
        raise TooFewLabels(
            f"class {class_name!r} has {len(groups)} different usable images, one each is needed for {', '.join(shares)}",
            class_name=class_name,
            num_images=len(groups),
        )
    cut: dict[str, list[int]] = {}
    done = position = 0
    wanted = 0.0
    for number, (part, count) in enumerate(_images_wanted(class_name, len(rows), shares).items()):
        wanted += count
        taken: list[int] = []
        left_for_others = len(shares) - number - 1
        while position < len(groups) - left_for_others and (not taken or done + len(groups[position]) / 2 <= wanted):
            taken += groups[position]
            done += len(groups[position])
            position += 1
        cut[part] = taken
    return cut
