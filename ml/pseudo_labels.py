"""Pseudo-labels at rest: label shards in Parquet, one row per image whatever happened to it. numpy and pyarrow only.

    key         str
    status      str              "ok", or why there is no guess, one of `ml.pixels.STATUSES`
    class       int16|null       place in the class names; int32 beyond 32767 classes
    confidence  float16|null     the largest probability
    probs       float16[K]|null  with `stored_probabilities="all"`; else the three columns
    top_classes int16[k]|null    the k most probable classes, falling
    top_probs   float16[k]|null
    residual    float16|null     probability of all other classes together
    agreement   float16|null     share of the teacher's views that alone would have guessed the class; absent where it had one view

Beside the facts, the file's metadata say how many guesses have each class and each confidence, where that is much shorter than the
columns themselves: selection then counts without reading them.

Axes: N rows, M rows with status ok, K classes, k stored probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import DataError
from ml.files import written_aside

Stored = int | Literal["all"]

PROBABILITY_COLUMNS = ("probs", "top_classes", "top_probs", "residual")
METADATA = b"pseudo_labels"
HISTOGRAM = b"histogram"
_HISTOGRAM_SHARE = 4
"""A histogram is kept when it has at most a fourth as many entries as there are guesses: beyond, the columns are as quickly read."""
_ROW_GROUP = 16384


def write_shard(
    path: str | Path,
    *,
    keys: Sequence[str],
    statuses: Sequence[str],
    probs_MK: npt.NDArray[np.float32],
    class_names: Sequence[str],
    stored_probabilities: Stored,
    facts: Mapping[str, Any],
    agreement_M: npt.NDArray[np.float32] | None = None,
) -> None:
    """Write one shard, whole or not at all. `probs_MK` (and `agreement_M`) has a row for each status "ok", in their order.

    `facts` are JSON-able words about where the labels come from (generation, digests); `read_facts` gives them back and
    `is_complete` compares them.
    """
    ok_N = np.array([status == "ok" for status in statuses], dtype=bool)
    if len(keys) != len(statuses) or probs_MK.shape != (int(ok_N.sum()), len(class_names)):
        raise ValueError(f"{len(keys)} keys, {len(statuses)} statuses with {ok_N.sum()} ok, but probabilities of shape {probs_MK.shape}")
    if not np.isfinite(probs_MK).all():
        raise ValueError("a probability is not a finite number")
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string()), "status": pa.array(statuses, pa.string())}
    classes_M = probs_MK.argmax(1) if len(probs_MK) else np.zeros(0, dtype=np.int64)
    columns["class"] = _scatter(classes_M.astype(_class_type(len(class_names))), ok_N)
    columns["confidence"] = _scatter(probs_MK.max(1, initial=0).astype(np.float16), ok_N)
    columns |= _probability_columns(probs_MK, ok_N, stored_probabilities)
    if agreement_M is not None:
        columns["agreement"] = _scatter(agreement_M.astype(np.float16), ok_N)
    words = json.dumps({"class_names": list(class_names), **facts}, sort_keys=True)
    histogram = _count(classes_M, probs_MK.max(1, initial=0).astype(np.float16))
    write_table(pa.table(columns), path, words, histogram=histogram)


def _count(classes_M: npt.NDArray[np.int64], confidences_M: npt.NDArray[np.float16]) -> str | None:
    """Class, confidence (as bits) and number of guesses, as three lists of JSON; None where that is not much shorter than the guesses."""
    pairs, counts = np.unique(classes_M.astype(np.int64) << 16 | confidences_M.view(np.uint16), return_counts=True)
    if len(pairs) * _HISTOGRAM_SHARE > len(classes_M):
        return None
    return json.dumps([(pairs >> 16).tolist(), (pairs & 0xFFFF).tolist(), counts.tolist()])


def read_histogram(path: str | Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], npt.NDArray[np.int64]] | None:
    """Classes, confidences and how many guesses have both; None when the shard does not tell. DataError when it is damaged."""
    try:
        found = (pq.read_schema(path).metadata or {}).get(HISTOGRAM)
        if found is None:
            return None
        classes, bits, counts = (np.array(column, dtype=np.int64) for column in json.loads(found))
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        raise DataError(f"{path} is not a readable label shard: {error}", path=str(path)) from error
    return classes, bits.astype(np.uint16).view(np.float16), counts


def write_table(table: pa.Table, path: str | Path, words: str, *, histogram: str | None = None) -> None:
    """Write a table of labels with `words` (JSON) in its metadata, whole or not at all, equal bytes for equal content."""
    with written_aside(Path(path)) as aside:
        table = table.replace_schema_metadata({METADATA: words} | ({} if histogram is None else {HISTOGRAM: histogram}))
        pq.write_table(table, aside, compression="zstd", row_group_size=_ROW_GROUP, use_dictionary=["status"])


def read_shard(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a shard (or only some columns); DataError when it is absent or damaged."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not a readable label shard: {error}", path=str(path)) from error


def read_facts(path: str | Path) -> dict[str, Any]:
    """`class_names` and the other facts that the shard was written with; DataError when it is absent or damaged."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return cast(dict[str, Any], json.loads(metadata[METADATA]))
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a readable label shard: {error}", path=str(path)) from error


def is_complete(path: str | Path, **facts: Any) -> bool:
    """Whether a whole shard lies at `path` and was written with these facts, so that labeling it again can be skipped."""
    try:
        found = read_facts(path)
    except DataError:
        return False
    return all(found.get(name) == value for name, value in facts.items())


def dense_probs(table: pa.Table, num_classes: int) -> npt.NDArray[np.float32]:
    """probs_NK as float32, each row summing to 1; the residual is spread evenly. Rows without a guess are all 0."""
    if "probs" in table.column_names:
        probs_NK = _dense_list(table.column("probs"), num_classes).astype(np.float32)
    else:
        top_classes = table.column("top_classes")
        stored = top_classes.type.list_size
        classes_Nk = _dense_list(top_classes, stored).astype(np.int64)
        residual_N = _dense_values(table.column("residual")).astype(np.float32)
        rest = residual_N / max(1, num_classes - stored)
        probs_NK = np.repeat(rest[:, None], num_classes, axis=1)
        np.put_along_axis(probs_NK, classes_Nk, _dense_list(table.column("top_probs"), stored).astype(np.float32), axis=1)
    sums_N = probs_NK.sum(1, keepdims=True)
    np.divide(probs_NK, sums_N, out=probs_NK, where=sums_N > 0)
    return probs_NK


def _probability_columns(probs_MK: npt.NDArray[np.float32], ok_N: npt.NDArray[np.bool_], stored: Stored) -> dict[str, Any]:
    num_classes = probs_MK.shape[1]
    if stored == "all" or stored >= num_classes:
        return {"probs": _scatter_rows(probs_MK.astype(np.float16), ok_N)}
    # Stable, so that equal probabilities keep the order of the classes, as argmax does.
    order_Mk = np.argsort(-probs_MK, axis=1, kind="stable")[:, :stored]
    top_Mk = np.take_along_axis(probs_MK, order_Mk, axis=1)
    residual_M = np.maximum(0, probs_MK.sum(1, dtype=np.float64) - top_Mk.sum(1, dtype=np.float64))
    return {
        "top_classes": _scatter_rows(order_Mk.astype(_class_type(num_classes)), ok_N),
        "top_probs": _scatter_rows(top_Mk.astype(np.float16), ok_N),
        "residual": _scatter(residual_M.astype(np.float16), ok_N),
    }


def _class_type(num_classes: int) -> type[np.int16] | type[np.int32]:
    return np.int16 if num_classes <= 32767 else np.int32


def _scatter(values_M: npt.NDArray[Any], ok_N: npt.NDArray[np.bool_]) -> pa.Array:
    values_N = np.zeros(len(ok_N), dtype=values_M.dtype)
    values_N[ok_N] = values_M
    return pa.array(values_N, mask=~ok_N)


def _scatter_rows(values_Mk: npt.NDArray[Any], ok_N: npt.NDArray[np.bool_]) -> pa.Array:
    width = values_Mk.shape[1]
    values_Nk = np.zeros((len(ok_N), width), dtype=values_Mk.dtype)
    values_Nk[ok_N] = values_Mk
    return pa.FixedSizeListArray.from_arrays(pa.array(values_Nk.reshape(-1)), width, mask=pa.array(~ok_N))


def _dense_list(column: pa.ChunkedArray, width: int) -> npt.NDArray[Any]:
    if column.type.list_size != width:
        raise DataError(f"labels hold {column.type.list_size} probabilities a row, {width} were expected")
    parts = [_list_values(chunk, width) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros((0, width), dtype=np.float16)


def _list_values(chunk: pa.FixedSizeListArray, width: int) -> npt.NDArray[Any]:
    # `.values` ignores the chunk's offset and keeps the slots of null rows.
    values = chunk.values.slice(chunk.offset * width, len(chunk) * width).to_numpy(zero_copy_only=False).reshape(-1, width)
    if chunk.null_count == 0:
        return cast(npt.NDArray[Any], values)
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    return np.where(valid[:, None], np.nan_to_num(values), np.zeros((), dtype=values.dtype))


def _dense_values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    values = column.to_numpy()
    return cast(npt.NDArray[Any], np.nan_to_num(values) if column.null_count else values)
