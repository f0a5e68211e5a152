"""Predict a whole dataset version with one generation."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ml.config import LabelingConfig
from ml.files import written_aside
from ml.pseudo_labels import read_facts, read_shard
from ml.tasks import LabelingTask
from workers.jobs import Made, Work
from workers.jobs.runtime import settle_runtime

STORED_CLASSES = 5
_ROW_GROUP = 8192


def run(work: Work) -> Made:
    """Input: generation (folder), manifest, num_images, runtime. The confidences are calibrated, as those of /predict."""
    runtime = settle_runtime(work)
    from ml.prediction import label

    guesses = work.directory / "guesses.parquet"
    task = LabelingTask(
        generation=work.input["generation"],
        unlabeled=work.input["manifest"],
        start=0,
        stop=work.input["num_images"],
        labeling=LabelingConfig(stored_probabilities=STORED_CLASSES, calibrate=True),
        runtime=runtime,
        output=str(guesses),
    )
    summary = label(task, work.on_event, work.should_stop)
    output = work.directory / "predictions.parquet"
    _write_named(output, guesses)
    return Made(files={output.name: output}, result={name: summary[name] for name in ("num_rows", "statuses", "images_per_second")})


def _write_named(path: Path, guesses: Path) -> None:
    """The guesses in words: key, status, class_name, confidence, top_class_names, top_probs (null where there is no guess)."""
    table = read_shard(guesses)
    class_names = read_facts(guesses)["class_names"]
    rows = table.select([name for name in table.column_names if name in _READ]).to_pylist()
    named = [_named(row, class_names) for row in rows]
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("status", pa.string()),
            ("class_name", pa.string()),
            ("confidence", pa.float32()),
            ("top_class_names", pa.list_(pa.string())),
            ("top_probs", pa.list_(pa.float32())),
        ]
    )
    with written_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(named, schema=schema), aside, compression="zstd", row_group_size=_ROW_GROUP)


_READ = ("key", "status", "class", "confidence", "top_classes", "top_probs", "probs")


def _named(row: dict[str, object], class_names: list[str]) -> dict[str, object]:
    words: dict[str, object] = {"key": row["key"], "status": row["status"], "class_name": None, "confidence": None}
    if row["class"] is None:
        return words | {"top_class_names": None, "top_probs": None}
    if "probs" in row:
        # Few classes: all probabilities are stored, in the order of the classes.
        pairs = sorted(enumerate(_numbers(row["probs"])), key=lambda pair: -pair[1])
    else:
        pairs = list(zip(map(int, _numbers(row["top_classes"])), _numbers(row["top_probs"]), strict=True))
    words |= {"class_name": class_names[pairs[0][0]], "confidence": pairs[0][1]}
    return words | {"top_class_names": [class_names[place] for place, _ in pairs], "top_probs": [value for _, value in pairs]}


def _numbers(values: object) -> list[float]:
    assert isinstance(values, list)
    return [float(value) for value in values]
