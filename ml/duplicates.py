"""Pool images that are evaluation images in disguise: the same pixels, or nearly the same picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.manifest import Manifest, read_batches

_PAIRS = 1 << 22


class Duplicates(NamedTuple):
    """Keys of the pool."""

    equal: set[str]
    """The same file or the same pixels."""
    near: set[str]
    """A perceptual hash within the distance; not those that are equal."""


def find_duplicates(
    pool: str | Path, evaluation: Sequence[Manifest], distance: int | None, *, on_rows: Callable[[int], None] | None = None
) -> Duplicates:
    """Images of the pool's manifest to leave out, so that no student learns from what it is judged by.

    `distance` counts differing bits of the 64-bit perceptual hash; None looks for equal ones only. Memory does not grow
    with the pool. Time is linear in all rows for distance 0 and grows with pool x evaluation above; `on_rows` hears how many
    rows of the pool are done.
    """
    found = Duplicates(set(), set())
    watched = [manifest.usable().table for manifest in evaluation]
    if not watched:
        return found
    digests = _all(watched, "pixel_digest")
    hashes_M = np.unique(_all(watched, "perceptual_hash").to_numpy())
    done = 0
    for table in read_batches(pool, ("key", "pixel_digest", "perceptual_hash")):
        # Equal files have equal pixels; broken ones have none.
        found.equal.update(table.filter(pc.is_in(table.column("pixel_digest"), value_set=digests)).column("key").to_pylist())
        if distance is not None:
            hashed = table.filter(pc.is_valid(table.column("perceptual_hash")))
            near_N = _near(hashed.column("perceptual_hash").to_numpy(), hashes_M, distance)
            found.near.update(hashed.column("key").filter(pa.array(near_N)).to_pylist())
        done += table.num_rows
        if on_rows is not None:
            on_rows(done)
    return Duplicates(found.equal, found.near - found.equal)


def _all(tables: Sequence[pa.Table], name: str) -> pa.Array:
    """One column of all tables, without nulls: null is equal to nothing."""
    return pa.concat_tables(tables).column(name).drop_null().combine_chunks()


def _near(hashes_N: npt.NDArray[np.uint64], watched_M: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.bool_]:
    if distance == 0 or len(watched_M) == 0:
        return np.isin(hashes_N, watched_M)
    near_N = np.zeros(len(hashes_N), dtype=bool)
    rows = max(1, _PAIRS // len(watched_M))
    for start in range(0, len(hashes_N), rows):
        part = slice(start, start + rows)
        near_N[part] = (np.bitwise_count(hashes_N[part, None] ^ watched_M[None]) <= distance).any(1)
    return near_N
