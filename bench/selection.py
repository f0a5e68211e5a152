"""Peak memory and speed of selecting from ten million synthetic rows, in a process of its own.

Rows are like those of a real pool of ten classes: label shards of 65 536 images with all probabilities in fp16, a pool manifest with
digests and perceptual hashes, and 10 000 evaluation images of which a hundred sit in the pool.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bench.measurement import PEAK_MB, Measurement
from ml.config import SelectionConfig
from ml.manifest import LOCATION_COLUMNS, metadata_of, schema
from ml.pseudo_labels import write_shard
from ml.tasks import SelectionTask

ROWS = 10_000_000
SMALLER = 1_000_000
SHARD = 65_536
EVALUATION = 10_000
LEAKED = 100
CLASSES = tuple(f"class-{number}" for number in range(10))
SEED = 3

_CHILD = (
    PEAK_MB
    + """
import json, sys, time
from ml.config import SelectionConfig
from ml.selection import select
from ml.tasks import SelectionTask
from ml.validation import build
words = json.load(open(sys.argv[1]))
task = SelectionTask(**(words | {"selection": build(SelectionConfig, words["selection"])}))
started = time.perf_counter()
report = select(task)
seconds = time.perf_counter() - started
peak = peak_mb()
removed = report["removed_duplicates"]["equal"]
json.dump({"seconds": seconds, "peak_mb": peak, "num_unique": report["num_unique"], "removed": removed}, sys.stdout)
"""
)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of the pool, sorted by key."""

    keys: list[str]
    digests: pa.Array
    hashes: npt.NDArray[np.uint64]


def measure() -> Measurement:
    found = Measurement(name="selection", details={"seed": SEED, "classes": len(CLASSES), "shard": SHARD, "evaluation": EVALUATION})
    rows = []
    for num_rows in (SMALLER, ROWS):
        with tempfile.TemporaryDirectory(prefix="bench-selection-") as directory:
            task = make_pool(Path(directory), num_rows)
            result = run(Path(directory), task)
        assert result["removed"] == LEAKED, result
        rows.append(
            {
                "rows": num_rows,
                "peak MB": result["peak_mb"],
                "seconds": result["seconds"],
                "rows/s": num_rows / result["seconds"],
                "selected": int(result["num_unique"]),
            }
        )
    found.tables["Selection (cap: largest class, balanced; peak resident memory of the whole process)"] = rows
    found.figures["selection-memory"] = float(rows[-1]["peak MB"])
    return found


def run(directory: Path, task: dict[str, object]) -> dict[str, float]:
    """Select in a process of its own: peak_mb, seconds, num_unique, removed."""
    words = directory / "task.json"
    words.write_text(json.dumps(task), encoding="utf-8")
    ended = subprocess.run([sys.executable, "-c", _CHILD, str(words)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(ended.stdout)
    return result


def make_pool(directory: Path, num_rows: int, *, shard: int = SHARD) -> dict[str, object]:
    """Write shards and manifests; the selection task as JSON."""
    generator = np.random.default_rng(SEED)
    shards: list[str] = []
    evaluation: list[_Part] = []
    pool = directory / "pool.parquet"
    with pq.ParquetWriter(pool, schema().with_metadata(metadata_of(directory, "unlabeled", ())), compression="zstd") as writer:
        for part in _parts(generator, num_rows, shard):
            writer.write_table(_manifest_table(part, class_name=None))
            shards.append(_write_shard(directory, part, generator, len(shards)))
            if not evaluation:
                evaluation.append(_Part(part.keys[:LEAKED], part.digests[:LEAKED], part.hashes[:LEAKED]))
    evaluation.append(next(_parts(generator, EVALUATION - LEAKED, SHARD)))
    test = directory / "test.parquet"
    with pq.ParquetWriter(test, schema().with_metadata(metadata_of(directory, "evaluation", CLASSES)), compression="zstd") as writer:
        for number, part in enumerate(evaluation):
            renamed = _Part([f"{number}/{key}" for key in part.keys], part.digests, part.hashes)
            writer.write_table(_manifest_table(renamed, class_name=CLASSES[0]))
    task = {
        "shards": shards[::-1],
        "unlabeled": str(pool),
        "evaluation": [str(test)],
        "class_names": list(CLASSES),
        # The separate hash of near pictures is random here, so that its hits would be accidents.
        "selection": {"min_confidence": 0.3, "near_duplicate_distance": 0},
        "seed": SEED,
        "output": str(directory / "selected.parquet"),
    }
    assert set(task) <= set(SelectionTask.__dataclass_fields__)
    assert SelectionConfig(min_confidence=0.3).cap_per_class == "largest-class"
    return task


def _parts(generator: np.random.Generator, num_rows: int, shard: int) -> Iterator[_Part]:
    for start in range(0, num_rows, shard):
        count = min(shard, num_rows - start)
        keys = [f"{number // 1000:05d}/{number:08d}.jpg" for number in range(start, start + count)]
        offsets = np.arange(count + 1, dtype=np.int32) * 64
        text = generator.bytes(32 * count).hex().encode()
        digests = pa.StringArray.from_buffers(count, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text))
        yield _Part(keys, digests, generator.integers(0, 2**63, count, dtype=np.uint64))


def _manifest_table(part: _Part, *, class_name: str | None) -> pa.Table:
    count = len(part.keys)
    constant = dict.fromkeys(LOCATION_COLUMNS) | {"class_name": class_name, "status": "ok", "bytes": 1000, "width": 32, "height": 32}
    columns = {name: pa.array([value] * count, schema().field(name).type) for name, value in constant.items()}
    columns |= {"key": pa.array(part.keys), "digest": part.digests, "pixel_digest": part.digests, "perceptual_hash": pa.array(part.hashes)}
    return pa.table({name: columns[name] for name in schema().names}, schema=schema())


def _write_shard(directory: Path, part: _Part, generator: np.random.Generator, number: int) -> str:
    path = directory / f"shard-{number:05d}.parquet"
    # Cubed exponentials: some guesses are sure, most are not, as a teacher's are.
    raw_NK = generator.standard_exponential((len(part.keys), len(CLASSES)), dtype=np.float32) ** 3
    probs_NK = raw_NK / raw_NK.sum(1, keepdims=True)
    statuses = ["ok"] * len(part.keys)
    write_shard(path, keys=part.keys, statuses=statuses, probs_MK=probs_NK, class_names=CLASSES, stored_probabilities="all", facts={})
    return str(path)
