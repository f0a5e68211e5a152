"""Choose and balance a teacher's guesses; beside the selection, list every guess by confidence. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.config import SelectionConfig
from ml.files import written_aside
from ml.manifest import Manifest, split_validation
from ml.pseudo_labels import read_shard
from ml.selection import select
from ml.tasks import SelectionTask
from ml.validation import build
from workers.jobs import Made, Work

ITEMS_ROW_GROUP = 8192
"""Rows that reading one page of items costs at least."""


def run(work: Work) -> Made:
    """Input: what SelectionTask names; `validation_cut` says which labeled images training will keep for validation."""
    given = work.input
    evaluation = list(given["evaluation"])
    if given["validation_cut"] is not None:
        evaluation.append(str(_cut_validation(work)))
    output = work.directory / "selected.parquet"
    task = SelectionTask(
        shards=tuple(given["shards"]),
        selection_shards=tuple(given["selection_shards"]),
        unlabeled=given["unlabeled"],
        evaluation=tuple(evaluation),
        class_names=tuple(given["class_names"]),
        selection=build(SelectionConfig, given["selection"]),
        seed=given["seed"],
        output=str(output),
        keep_keys_of=given["keep_keys_of"],
    )
    report = select(task, work.on_event, work.should_stop)
    items = work.directory / "items.parquet"
    write_items(items, given["selection_shards"] or given["shards"], output)
    return Made(files={output.name: output, items.name: items}, result={"report": report})


def _cut_validation(work: Work) -> Path:
    """The validation images exactly as training cuts them, so that none of them stays in the pool."""
    cut = work.input["validation_cut"]
    _, validation = split_validation(Manifest.read(cut["labeled"]), cut["ratio"], cut["seed"])
    path = work.directory / "validation.parquet"
    validation.as_kind("evaluation").write(path)
    return path


def write_items(path: Path, shards: Sequence[str], selected: Path) -> None:
    """Every image of the pool: key, status, class, confidence, repeat (0: not selected); by falling confidence, then by key.

    Images without a guess come last.
    """
    columns = ["key", "status", "class", "confidence"]
    table = pa.concat_tables([read_shard(shard, columns) for shard in shards])
    # Sorting has no kernel for fp16; as float32 the values are the same.
    table = table.set_column(3, "confidence", table.column("confidence").cast(pa.float32()))
    chosen = pq.read_table(selected, columns=["key", "repeat"], partitioning=None)
    places = pc.index_in(table.column("key"), value_set=chosen.column("key").combine_chunks())
    repeats = pc.fill_null(chosen.column("repeat").take(places), 0).cast(pa.int32())
    table = table.append_column("repeat", repeats)
    order = pc.sort_indices(table, [("confidence", "descending"), ("key", "ascending")])
    with written_aside(path) as aside:
        ordered = table.take(order).replace_schema_metadata(None)
        pq.write_table(ordered, aside, compression="zstd", row_group_size=ITEMS_ROW_GROUP, use_dictionary=["status"])
