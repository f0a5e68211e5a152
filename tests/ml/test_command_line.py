"""`python -m ml`: every verb on real digits, stopped and gone on with, and refused in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml.__main__ import main
from tests.ml.builders_training import write_digits

TRAINING = {"batch_size": 8, "ema_decay": 0.5, "evaluate_every_steps": 10}
RECIPE: dict[str, Any] = {
    "image": {"size": 16, "padding": 2},
    "validation_ratio": 0.25,
    "teacher": {"training": {**TRAINING, "steps": 20}},
    "students": [{"ratio": 1, "training": {**TRAINING, "steps": 20}}],
    "iterations": {"count": 1, "control": False},
    "selection": {"min_confidence": 0.0, "require_every_class": False},
    "runtime": {"device": "cpu", "num_threads": 1, "num_loader_workers": 0},
}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command takes the signals of its process, which here is the tests'."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), pool=60)


def run_arguments(digits: Path, out: Path, recipe: dict[str, Any] = RECIPE) -> list[str]:
    folders = [f"--{name}={digits / folder}" for name, folder in (("labeled", "labeled"), ("unlabeled", "pool"), ("test", "test"))]
    return ["--json", "run", *folders, f"--out={out}", "--recipe=digits", f"--override={json.dumps(recipe)}"]


def test_a_run_that_is_stopped_goes_on_with_the_same_command_and_ends_with_the_same_weights(digits: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"teacher": {"training": {**TRAINING, "steps": 160, "evaluate_every_steps": 80}}}
    command = [sys.executable, "-m", "ml", *run_arguments(digits, tmp_path / "stopped", recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["kind"] == "metric":
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
    assert process.returncode == 130
    assert not (tmp_path / "stopped" / "generation-0").exists()

    assert main(run_arguments(digits, tmp_path / "stopped", recipe)) == 0
    assert main(run_arguments(digits, tmp_path / "undisturbed", recipe)) == 0

    for name in ("generation-0", "generation-1"):
        ours, theirs = (tmp_path / out / name / "model.safetensors" for out in ("stopped", "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes()
    written = (tmp_path / "stopped" / "generation-1" / "model.onnx").stat().st_mtime_ns
    assert main(run_arguments(digits, tmp_path / "stopped", recipe)) == 0
    assert (tmp_path / "stopped" / "generation-1" / "model.onnx").stat().st_mtime_ns == written, "what is finished is left alone"


def test_the_verbs_make_by_hand_what_run_makes(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, labels, selected = tmp_path / "teacher", tmp_path / "labels", tmp_path / "selected.parquet"
    runtime = json.dumps(RECIPE["runtime"])
    train = ["train", f"--labeled={digits / 'labeled'}", f"--test={digits / 'test'}", f"--out={trained}", "--recipe=digits"]
    generation = str(trained / "generation")

    assert main(["--json", *train, f"--override={json.dumps(RECIPE)}"]) == 0
    assert main(["--json", "label", generation, f"--unlabeled={digits / 'pool'}", f"--out={labels}", f"--runtime={runtime}"]) == 0
    choice = json.dumps(RECIPE["selection"])
    assert main(["--json", "select", str(labels), f"--out={selected}", f"--selection={choice}", f"--evaluation={digits / 'test'}"]) == 0
    capsys.readouterr()
    assert main(["--json", "evaluate", generation, f"--images={digits / 'test'}", f"--runtime={runtime}"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    classes = str(Path(generation) / "class_names.json")
    assert main(["--json", "export", generation, f"--classes={classes}", f"--out={tmp_path / 'exported'}"]) == 0

    metrics = json.loads((Path(generation) / "metrics.json").read_text())
    assert measured["top1"] == metrics["test"]["top1"]
    assert selected.is_file()
    assert (tmp_path / "exported" / "model.onnx").is_file()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_training_and_measuring_on_one_folder_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    labeled = digits / "labeled"

    code = main(["train", f"--labeled={labeled}", f"--{split}={labeled}", f"--out={tmp_path / 'out'}", "--recipe=digits"])

    assert code == 1
    assert "also sit in labeled" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_cannot_work_is_refused_in_one_line(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_arguments(digits, tmp_path, RECIPE | {"validation_ratio": 2})) == 1

    assert capsys.readouterr().err.startswith("refused: ")
