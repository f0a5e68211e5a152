"""What the child does beyond calling ml: lists of guesses, halved micro-batches, names of classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ml.config import StudentConfig, TrainingConfig
from ml.errors import ClassMismatch, WeightsError
from ml.manifest import Manifest
from ml.pseudo_labels import write_shard
from ml.recipes import get_recipe
from ml.validation import to_dict
from tests.ml.builders_images import write_class_folders
from workers.jobs import MODULES, Work
from workers.jobs import ingest as ingest_job
from workers.jobs import select as select_job
from workers.jobs import split as split_job
from workers.jobs.import_generation import find_class_names
from workers.jobs.predict import _write_named
from workers.jobs.train import build_task

NAMES = ["cat", "dog"]


def source(path: str, kind: str) -> dict[str, Any]:
    """What a reading is told."""
    return {"path": path, "format": None, "split": None, "pack": None, "kind": kind}


def make_work(directory: Path, given: dict[str, Any], **values: Any) -> Work:
    directory.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "input": given,
        "directory": directory,
        "halve_micro_batch": False,
        "capabilities": ("cpu",),
        "on_event": lambda _event: None,
        "should_stop": lambda: False,
        "on_runtime": lambda _runtime: None,
    }
    return Work(**(defaults | values))


def make_pool(directory: Path, count: int) -> Path:
    """Manifest of a pool with so many images."""
    write_class_folders(directory / "pool", {"x": count})
    made = ingest_job.run(make_work(directory / "ingest", source(str(directory / "pool"), "unlabeled")))
    return made.files["manifest.parquet"]


def make_shard(path: Path, keys: list[str], confidences: list[float | None], *, stored: int | str = "all") -> str:
    """Guesses `dog` with these confidences; None is an image that could not be read."""
    probs = np.array([[1 - value, value] for value in confidences if value is not None], np.float32).reshape(-1, 2)
    statuses = ["ok" if value is not None else "undecodable" for value in confidences]
    facts: dict[str, Any] = {"class_names": NAMES, "stored_probabilities": stored, "facts": {}}
    write_shard(path, keys=keys, statuses=statuses, probs_MK=probs, **facts)
    return str(path)


def test_every_guess_is_listed_by_confidence_whether_selected_or_not(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, 6)
    keys = Manifest.read(pool).column("key")
    selection = get_recipe("digits").selection
    given = {
        "shards": [
            make_shard(tmp_path / "b.parquet", keys[3:], [0.75, 0.9375, 0.75]),
            make_shard(tmp_path / "a.parquet", keys[:3], [0.875, None, 0.5625]),
        ],
        "selection_shards": [],
        "unlabeled": str(pool),
        "evaluation": [],
        "validation_cut": None,
        "class_names": NAMES,
        "selection": to_dict(replace(selection, min_confidence=0.7, require_every_class=False)),
        "seed": 0,
        "keep_keys_of": None,
    }

    made = select_job.run(make_work(tmp_path / "job", given))

    rows = pq.read_table(made.files["items.parquet"]).to_pylist()
    assert [row["key"] for row in rows] == [keys[4], keys[0], keys[3], keys[5], keys[2], keys[1]]
    assert [row["repeat"] > 0 for row in rows] == [True, True, True, True, False, False]
    assert rows[-1] == {"key": keys[1], "status": "undecodable", "class": None, "confidence": None, "repeat": 0}
    assert made.result["report"]["num_unique"] == 4


def test_the_validation_images_that_training_will_cut_are_kept_out_of_the_pool(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "labeled", {"cat": 4, "dog": 4})
    labeled = ingest_job.run(make_work(tmp_path / "l", source(str(folder), "labeled"))).files["manifest.parquet"]
    pool = ingest_job.run(make_work(tmp_path / "u", source(str(folder), "unlabeled"))).files["manifest.parquet"]
    keys = Manifest.read(pool).column("key")
    selection = to_dict(replace(get_recipe("digits").selection, require_every_class=False, balance=False))
    given = {
        "shards": [make_shard(tmp_path / "a.parquet", keys, [0.9] * 8)],
        "selection_shards": [],
        "unlabeled": str(pool),
        "evaluation": [],
        "validation_cut": {"labeled": str(labeled), "ratio": 0.5, "seed": 0},
        "class_names": NAMES,
        "selection": selection,
        "seed": 0,
        "keep_keys_of": None,
    }

    made = select_job.run(make_work(tmp_path / "job", given))

    assert made.result["report"]["removed_duplicates"]["equal"] == 4
    assert made.result["report"]["num_unique"] == 4


def test_the_parts_of_a_split_state_their_classes(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "images", {"cat": 6, "dog": 6})
    manifest = ingest_job.run(make_work(tmp_path / "l", source(str(folder), "labeled"))).files["manifest.parquet"]
    targets = {"labeled": {"version_id": "a", "share": 2}, "unlabeled": {"version_id": "b", "share": "rest"}}

    made = split_job.run(make_work(tmp_path / "job", {"manifest": str(manifest), "targets": targets, "seed": 0}))

    parts = made.result["parts"]
    assert parts["labeled"]["report"]["classes"] == {"cat": 2, "dog": 2}
    assert parts["labeled"]["manifest"] == {"num_images": 4, "num_usable": 4, "class_names": NAMES}
    assert parts["unlabeled"]["manifest"] == {"num_images": 8, "num_usable": 8, "class_names": []}


@pytest.mark.parametrize("stored", ["all", 1])
def test_batch_predictions_speak_of_classes_by_name(tmp_path: Path, stored: int | str) -> None:
    make_shard(tmp_path / "guesses.parquet", ["a", "b", "c"], [0.75, None, 0.25], stored=stored)

    _write_named(tmp_path / "predictions.parquet", tmp_path / "guesses.parquet")

    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["class_name"] for row in rows] == ["dog", None, "cat"]
    assert [row["confidence"] for row in rows] == [0.75, None, 0.75]
    assert rows[0]["top_class_names"] == (["dog", "cat"] if stored == "all" else ["dog"])


def test_running_out_of_memory_doubles_the_micro_batches(tmp_path: Path) -> None:
    recipe = get_recipe("digits")
    student = StudentConfig(training=TrainingConfig(steps=1, batch_size=9))
    paths = dict.fromkeys(("labeled", "validation", "test", "unlabeled", "selected", "initial_weights", "teacher"))
    given = {"recipe": to_dict(recipe), "student": to_dict(student), "runtime": to_dict(recipe.runtime), "role": "student", **paths}
    given |= {"iteration": 1, "teacher_parameters": None, "lineage": {}}

    task = build_task(make_work(tmp_path, given, halve_micro_batch=True))

    assert task.recipe.teacher.training.accumulation == 2 * recipe.teacher.training.accumulation
    # Nine images cannot be halved, so they stay together.
    assert task.student is not None
    assert task.student.training.accumulation == 1


def test_auto_takes_no_device_that_the_worker_does_not_name(tmp_path: Path) -> None:
    recipe = get_recipe("digits")
    given = {"recipe": to_dict(recipe), "student": None, "runtime": to_dict(recipe.runtime), "role": "teacher", "iteration": 0}
    given |= dict.fromkeys(("labeled", "validation", "test", "unlabeled", "selected", "initial_weights", "teacher", "teacher_parameters"))
    told: list[Any] = []

    task = build_task(make_work(tmp_path, given | {"lineage": {}}, on_runtime=told.append))

    assert task.runtime.device == "cpu"
    assert task.runtime.num_threads > 0
    assert told == [task.runtime]


def test_an_import_takes_the_class_names_that_the_folder_states(tmp_path: Path) -> None:
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"label_names": NAMES}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_class_names(tmp_path) == NAMES

    (tmp_path / "class_names.json").write_text('["a", "b"]')
    assert find_class_names(tmp_path) == ["a", "b"]

    (tmp_path / "class_names.json").write_text("{")
    with pytest.raises(WeightsError, match="not readable"):
        find_class_names(tmp_path)

    (tmp_path / "class_names.json").unlink()
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    with pytest.raises(ClassMismatch, match="give class_names"):
        find_class_names(tmp_path)


def test_every_kind_of_job_has_its_module() -> None:
    from core.lifecycle import JOB_KINDS

    assert set(MODULES) == set(JOB_KINDS)
