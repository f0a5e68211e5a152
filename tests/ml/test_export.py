"""An exported generation opens without this project and gives the same probabilities."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image

from ml.config import ImageConfig
from ml.errors import ClassMismatch, WeightsError
from ml.export import file_digests, import_generation
from ml.models import load_generation
from ml.pixels import Preprocessing, normalize, weak_view
from tests.ml.builders_generations import build_generation

CLASSES = ("blue", "red")


def test_timm_and_a_bare_onnx_session_give_the_same_probabilities(tmp_path: Path) -> None:
    folder = build_generation(tmp_path / "generation")
    preprocessing = Preprocessing.from_dict(json.loads((folder / "preprocessing.json").read_text()))
    pictures = np.random.default_rng(3).integers(0, 256, (7, 40, 50, 3), dtype=np.uint8)
    inputs = normalize(np.stack([weak_view(Image.fromarray(picture), preprocessing) for picture in pictures]), preprocessing)

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    by_onnx = torch.from_numpy(session.run(None, {"images": inputs})[0]).softmax(-1)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        by_timm = network(torch.from_numpy(inputs)).softmax(-1)
        ours = load_generation(folder, torch.device("cpu")).network(torch.from_numpy(inputs)).softmax(-1)

    torch.testing.assert_close(by_onnx, by_timm, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, by_timm, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_onnx_file_takes_any_batch_and_is_one_file(tmp_path: Path, batch: int) -> None:
    folder = build_generation(tmp_path / "generation")

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"images": np.zeros((batch, 3, 32, 32), np.float32)})

    assert logits.shape == (batch, 2)
    assert not list(folder.glob("*.data"))


def test_parity_is_measured_and_stored(tmp_path: Path) -> None:
    folder = build_generation(tmp_path / "generation")

    parity = json.loads((folder / "metrics.json").read_text())["onnx_parity"]

    assert parity["num_images"] == 4
    assert parity["top1_agreement"] == 1.0
    assert parity["max_probability_difference"] < 1e-5


def test_the_card_says_what_it_is_and_how_to_open_it(tmp_path: Path) -> None:
    card = (build_generation(tmp_path / "generation") / "README.md").read_text()

    for word in ("test_resnet", "blue, red", "local-dir:.", "onnxruntime", '"run": "r_1"'):
        assert word in card


def test_digests_name_every_file_and_change_with_it(tmp_path: Path) -> None:
    folder = build_generation(tmp_path / "generation")
    before = file_digests(folder)
    (folder / "calibration.json").write_text("{}")

    after = file_digests(folder)

    assert set(before) == {path.name for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"calibration.json"}


def test_an_imported_generation_keeps_weights_preprocessing_and_temperature(tmp_path: Path) -> None:
    source = build_generation(tmp_path / "source")

    metrics = import_generation(source, tmp_path / "imported", class_names=CLASSES)

    before, after = load_generation(source, torch.device("cpu")), load_generation(tmp_path / "imported", torch.device("cpu"))
    assert before[1:] == after[1:]
    assert all(torch.equal(a, b) for a, b in zip(before.network.parameters(), after.network.parameters(), strict=True))
    assert metrics["role"] == "imported"
    assert metrics["onnx_parity"]["top1_agreement"] == 1.0


def test_a_folder_that_timm_wrote_is_imported_with_timms_preprocessing(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    network = timm.create_model("test_resnet", num_classes=2)
    save_for_hf(network, str(tmp_path / "source"), safe_serialization=True)

    import_generation(tmp_path / "source", tmp_path / "imported", class_names=CLASSES)

    preprocessing = load_generation(tmp_path / "imported", torch.device("cpu")).preprocessing
    assert (preprocessing.size, preprocessing.crop_ratio, preprocessing.mean) == (160, 0.95, (0.5, 0.5, 0.5))
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "model.pt")
    with pytest.raises(WeightsError, match="safetensors"):
        import_generation(tmp_path / "source", tmp_path / "again", class_names=CLASSES, image=ImageConfig(size=32))


@pytest.mark.parametrize("expected", [("red", "blue"), ("blue", "green"), ("blue", "red", "green")])
def test_another_class_list_is_refused_and_leaves_nothing(tmp_path: Path, expected: tuple[str, ...]) -> None:
    source = build_generation(tmp_path / "source")

    with pytest.raises(ClassMismatch):
        import_generation(source, tmp_path / "imported", class_names=expected)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from ml.errors import DiskFull
from ml.export import import_generation
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        import_generation(Path(sys.argv[1]), Path(sys.argv[2]), class_names=("blue", "red"))
    except DiskFull:
        print("full", [path.name for path in Path(sys.argv[2]).parent.iterdir()])
"""


def test_a_full_disk_is_named_whichever_file_it_hits_and_nothing_half_written_stays(tmp_path: Path) -> None:
    source = build_generation(tmp_path / "source")
    weights, onnx = ((source / name).stat().st_size for name in ("model.safetensors", "model.onnx"))
    assert weights < onnx - 1000
    (tmp_path / "out").mkdir()

    command = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "out" / "generation"), "10000", str((weights + onnx) // 2)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)

    assert done.stdout == "full []\nfull []\n"
