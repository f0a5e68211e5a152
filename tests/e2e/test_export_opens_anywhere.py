"""A downloaded generation answers like `/predict` in timm and in ONNX Runtime, prepared by its own preprocessing.json alone."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.e2e.processes import Service, embedded
from tests.e2e.test_whole_loop import RECIPE, promote, start_run, wait_for_iteration, write_folders
from tests.ml import builders_images as images

pytestmark = pytest.mark.timeout(900)

FILES = ("config.json", "model.safetensors", "model.onnx", "preprocessing.json", "class_names.json")
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SHAPES = ((32, 32), (48, 20), (17, 61), (200, 150), (9, 9))
ALLOWED = 1e-4
CENTER_CUT = {**RECIPE, "image": {"small_images": False, "crop_ratio": 0.8}}


def build_files() -> list[bytes]:
    """240 image files: square or not, in color, gray, with a palette or with transparency, PNG or WebP or JPEG."""
    files = []
    for number in range(240):
        width, height = SHAPES[number % len(SHAPES)]
        image = images.build_image(5000 + number, width=width, height=height, hue=number % 3)
        kind = number // len(SHAPES) % 6
        if kind == 1:
            image = image.convert("L")
        elif kind == 2:
            image = image.quantize(32)
        elif kind == 3:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        elif kind == 4:
            image = image.convert("LA")
        files.append(images.encode(image, "JPEG", quality=90) if kind == 5 else images.encode(image))
    return files


def prepare(data: bytes, told: dict[str, Any]) -> NDArray[np.float32]:
    """One image as float32 [3, size, size], by the words of preprocessing.json: this project's code is not asked."""
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    size, resample = told["size"], FILTERS[told["interpolation"]]
    if told["small_images"]:
        image = image.resize((size, size), resample)
    else:
        shorter = math.floor(size / told["crop_ratio"])
        width, height = image.size
        scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
        left, top = (round((side - size) / 2) for side in scaled)
        image = image.resize(scaled, resample).crop((left, top, left + size, top + size))
    pixels_HWC = np.asarray(image, np.float32) / 255
    normalized_HWC = (pixels_HWC - np.asarray(told["mean"], np.float32)) / np.asarray(told["std"], np.float32)
    return normalized_HWC.transpose(2, 0, 1).astype(np.float32)


def softmax(logits_MK: NDArray[np.float32]) -> NDArray[np.float64]:
    exponents_MK = np.exp(logits_MK.astype(np.float64) - logits_MK.max(-1, keepdims=True))
    return np.asarray(exponents_MK / exponents_MK.sum(-1, keepdims=True))


def download(service: Service, generation_id: str, folder: Path) -> Path:
    folder.mkdir()
    for name in FILES:
        response = service.client.get(f"/api/v1/generations/{generation_id}/files/{name}")
        assert response.status_code == 200, response.text
        (folder / name).write_bytes(response.content)
    return folder


def ask(service: Service, files: list[bytes], class_names: list[str]) -> NDArray[np.float64]:
    """Uncalibrated probabilities [M, K] by `/predict`."""
    rows = []
    for data in files:
        response = service.client.post(
            f"/predict?calibrated=false&top_k={len(class_names)}", content=data, headers={"Content-Type": "application/octet-stream"}
        )
        assert response.status_code == 200, response.text
        top = {entry["label"]: entry["probability"] for entry in response.json()["top"]}
        assert response.json()["label"] == max(top, key=top.__getitem__)
        rows.append([top[name] for name in class_names])
    return np.asarray(rows)


@pytest.mark.parametrize("recipe", [pytest.param(RECIPE, id="squashed", marks=pytest.mark.long), pytest.param(CENTER_CUT, id="center cut")])
def test_timm_and_onnx_runtime_answer_like_predict(tmp_path: Path, recipe: dict[str, Any]):
    folders, files = write_folders(tmp_path / "images"), build_files()
    with embedded(tmp_path, roots=tmp_path / "images") as service:
        run_id = start_run(service, folders, iterations="manual", recipe=recipe)["id"]
        generation_id = wait_for_iteration(service, run_id, 0)["generation_id"]
        assert promote(service, generation_id, **{"If-None-Match": "*"}).status_code == 200
        folder = download(service, generation_id, tmp_path / "downloaded")
        class_names = json.loads((folder / "class_names.json").read_text())
        served_MK = ask(service, files, class_names)

    told = json.loads((folder / "preprocessing.json").read_text())
    assert told["small_images"] is (recipe is RECIPE)
    inputs_MCHW = np.stack([prepare(data, told) for data in files])
    with torch.inference_mode():
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_timm_MK = softmax(network(torch.from_numpy(inputs_MCHW)).numpy())
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    by_onnx_MK = softmax(session.run(None, {"images": inputs_MCHW})[0])

    assert len(files) >= 200
    assert len(set(served_MK.argmax(-1))) > 1
    for theirs_MK in (by_timm_MK, by_onnx_MK):
        assert np.abs(theirs_MK - served_MK).max() <= ALLOWED
        assert (theirs_MK.argmax(-1) == served_MK.argmax(-1)).all()
