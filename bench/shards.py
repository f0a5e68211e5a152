"""Memory by the number of shards: of a labeling process that takes one after another, of selection, and of a supervisor that lists them.

By hand: `python -m bench shards`, some three minutes. Each peak is that of a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench import selection
from bench.labeling import export
from bench.measurement import PEAK_MB, Measurement
from bench.photographs import manifest_of, small_photographs
from bench.service import Service, migrate
from core.db.datasets import add_version, create_dataset, finish_version
from core.db.pseudo_labels import create_set, enqueue_selection, write_next_jobs
from core.db.session import Database, now
from core.db.tables import Generation, Job, StoredFile
from core.settings import Settings
from core.storage import make_storage
from ml.recipes import get_recipe
from ml.validation import to_dict

SELECTED_ROWS = 1_000_000
SHARD_COUNTS = (10, 100, 1000)
LABELED_SHARDS = (4, 32)
LABELED_SHARD_SIZE = 256
LISTED_SHARDS = (10, 1000, 30_000)

_LABEL = (
    PEAK_MB
    + """
import json, sys
from ml.config import LabelingConfig, RuntimeConfig
from ml.devices import apply_runtime, resolve_runtime
from ml.prediction import label
from ml.tasks import LabelingTask
words = json.load(open(sys.argv[1]))
runtime = resolve_runtime(RuntimeConfig(device="cpu"))
apply_runtime(runtime)
for number in range(words["shards"]):
    start = number * words["size"]
    label(LabelingTask(
        generation=words["generation"], unlabeled=words["pool"], start=start, stop=start + words["size"],
        labeling=LabelingConfig(), runtime=runtime, output=f"{words['output']}/{number}.parquet",
    ))
print(peak_mb())
"""
)
_LIST = (
    PEAK_MB
    + """
import sys
from core.db.jobs import get_job
from core.db.session import Database
from core.settings import Settings
from core.storage import make_storage
from workers.inputs import Inputs
import workers.supervisor
settings = Settings()
database = Database(settings.resolved_database_url)
with database.reading() as session:
    job = get_job(session, sys.argv[1])
found = Inputs(database, make_storage(settings), settings, capabilities=("cpu",)).resolve(job)
assert len(found["shards"]) == int(sys.argv[2]), len(found["shards"])
print(peak_mb())
"""
)


def measure() -> Measurement:
    found = Measurement(name="shards", details={"selected rows": SELECTED_ROWS, "labeled shard": LABELED_SHARD_SIZE})
    for identity, title, counts, peak in (
        ("labeling-shards", "Labeling, one process, one shard after another", LABELED_SHARDS, _label),
        ("selection-shards", f"Selection from {SELECTED_ROWS} rows", SHARD_COUNTS, _select),
        ("supervisor-lists", "A supervisor's list of the shards to select from", LISTED_SHARDS, _list),
    ):
        peaks = []
        for count in counts:
            with tempfile.TemporaryDirectory(prefix="bench-shards-") as directory:
                peaks.append(peak(Path(directory), count))
        found.tables[title] = [{"shards": count, "peak MB": value} for count, value in zip(counts, peaks, strict=True)]
        found.figures[identity] = peaks[-1] if peak is _list else peaks[-1] / peaks[0]
    return found


def _run(code: str, *arguments: str, environment: dict[str, str] | None = None) -> float:
    ended = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, env=environment)
    return float(ended.stdout.strip().splitlines()[-1])


def _label(directory: Path, count: int) -> float:
    pool = manifest_of(small_photographs(8192), kind="unlabeled")
    generation = export("small-32px", directory / "generation")
    words = {"shards": count, "size": LABELED_SHARD_SIZE, "generation": str(generation), "pool": str(pool), "output": str(directory)}
    (directory / "words.json").write_text(json.dumps(words), encoding="utf-8")
    return _run(_LABEL, str(directory / "words.json"))


def _select(directory: Path, count: int) -> float:
    task = selection.make_pool(directory, SELECTED_ROWS, shard=SELECTED_ROWS // count)
    return float(selection.run(directory, task)["peak_mb"])


def _list(directory: Path, count: int) -> float:
    settings = Settings(data_directory=directory / "data")
    environment = {"NOISY_STUDENT_DATA_DIRECTORY": str(directory / "data")}
    migrate(Service(directory, 0, environment))
    database = Database(settings.resolved_database_url)
    (directory / "shard").write_text("stands for each shard", encoding="utf-8")
    kept = make_storage(settings).put(directory / "shard")
    job_id = _insert_set(database, count, kept)
    database.close()
    return _run(_LIST, job_id, str(count), environment={**os.environ, **environment})


def _insert_set(database: Database, count: int, kept: dict[str, Any]) -> str:
    """A set whose shards are all labeled; the id of its selection job."""
    with database.transaction() as session:
        version, _ = add_version(session, create_dataset(session, name="pool", kind="unlabeled"), source={"folder": "/data"}, ingest=False)
        facts = {"num_images": count, "num_usable": count, "class_names": [], **kept}
        finish_version(session, version.id, manifest=facts, report={})
        moment = now(session)
        teacher: dict[str, Any] = {
            "id": "gen_teacher",
            "role": "imported",
            "job_id": "job_import",
            "architecture": "x",
            "num_parameters": 1,
        }
        teacher |= {"class_names": ["a", "b"], "digest": "0" * 64, "metrics": {}, "lineage": {}, "created_at": moment}
        session.add(Generation(**teacher))
        session.flush()
        recipe = to_dict(get_recipe("digits"))
        row = create_set(
            session,
            generation_id="gen_teacher",
            unlabeled_version_id=version.id,
            num_images=count,
            labeling=recipe["labeling"] | {"shard_size": 1},
            selection=recipe["selection"],
            seed=0,
            capability="cpu",
            runtime=recipe["runtime"],
            evaluation_version_ids=[],
        )
        while write_next_jobs(session, row.id):
            pass
        jobs = session.scalars(sa.select(Job.id).where(Job.pseudo_label_set_id == row.id))
        files = [{"owner_id": job_id, "name": "shard.parquet", "digest": kept["digest"], "num_bytes": kept["num_bytes"]} for job_id in jobs]
        session.execute(sa.insert(StoredFile), files)
        done = sa.update(Job).where(Job.pseudo_label_set_id == row.id).values(status="succeeded", finished_at=moment)
        session.execute(done.execution_options(synchronize_session=False))
        return enqueue_selection(session, row).id
