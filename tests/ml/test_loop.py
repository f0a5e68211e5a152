"""A local run: what it refuses before anything is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ml.config import Recipe
from ml.errors import Leakage, NoImages, RecipeError, TooFewLabels
from ml.events import Event
from ml.loop import Folders, LocalRun
from ml.manifest import Manifest
from ml.recipes import build_recipe
from tests.ml.builders_images import write_class_folders, write_flat_folder

SMALL = {"training": {"batch_size": 4}}
RECIPE = build_recipe("digits", {"runtime": {"num_threads": 1, "num_loader_workers": 0}, "teacher": SMALL, "students": [SMALL]})


class Read(Exception):
    """The folders were read and found good."""


def stop_at_training(event: Event) -> None:
    if event.data.get("stage") == "training":
        raise Read


def write_folders(root: Path) -> Folders:
    counts = {"blue": 4, "red": 4}
    write_flat_folder(root / "pool", 4)
    for number, name in enumerate(("labeled", "test", "validation")):
        write_class_folders(root / name, counts, first=100 * number)
    named = {name: root / name for name in ("labeled", "test", "validation")}
    return Folders(unlabeled=root / "pool", output=root / "out", **named)


def run(folders: Folders, recipe: Recipe = RECIPE) -> None:
    LocalRun(folders, recipe, on_event=stop_at_training).run()


def test_a_test_image_that_sits_in_validation_is_refused(tmp_path: Path):
    folders = write_folders(tmp_path)
    shutil.copy(tmp_path / "test" / "red" / "00104.png", tmp_path / "validation" / "red" / "copy.png")

    with pytest.raises(Leakage, match="1 test images also sit in validation"):
        run(folders)


def test_a_selection_model_is_refused_because_only_the_service_has_one(tmp_path: Path):
    with pytest.raises(RecipeError, match="service") as refused:
        LocalRun(write_folders(tmp_path), build_recipe("digits", {"labeling": {"selection_model": "generation:gen_1"}}))

    assert refused.value.pointer == "/labeling/selection_model"


def test_an_output_folder_goes_on_with_its_own_folders_only(tmp_path: Path):
    folders = write_folders(tmp_path)
    for _ in range(2):
        with pytest.raises(Read):
            run(folders)

    with pytest.raises(FileExistsError, match="a run over other folders"):
        run(replace(folders, test=None))
    with pytest.raises(FileExistsError, match="a run with another recipe"):
        run(folders, replace(RECIPE, seed=7))


def test_what_was_refused_does_not_use_the_output_folder_up(tmp_path: Path):
    folders = write_folders(tmp_path)
    too_large = build_recipe("digits", {"teacher": {"training": {"batch_size": 9}}, "students": [{"training": {"batch_size": 10}}]})

    with pytest.raises(NoImages):
        run(replace(folders, unlabeled=tmp_path / "nope"))
    with pytest.raises(TooFewLabels) as refused:
        run(replace(folders, labeled=tmp_path / "test", test=None), too_large)
    with pytest.raises(Read):
        run(folders)

    assert "batch of 9 (teacher.training.batch_size) and 10 (students.0.training.batch_size)" in str(refused.value)
    assert Manifest.read(folders.output / "manifests" / "labeled.parquet").root == str(folders.labeled)
