"""A generation as files: timm's layout, ONNX, and beside them what a server needs to answer like the training's evaluation.

config.json model.safetensors   timm's `local-dir` layout
model.onnx                      input "images" float32 [batch, 3, size, size], normalized; output "logits" [batch, K]
preprocessing.json              `ml.pixels.Preprocessing`
class_names.json                in the order of the logits
calibration.json                {"temperature": T}: divide the logits by it before the softmax
metrics.json                    everything that was measured
*_predictions.parquet           one row per evaluated image, to compare generations pairwise
README.md                       model card
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ml import calibration, models
from ml.config import ImageConfig, RuntimeConfig
from ml.errors import ClassMismatch, WeightsError
from ml.files import folder_written_aside
from ml.model_card import model_card
from ml.pixels import Preprocessing, normalize
from ml.prediction import forward

ONNX = "model.onnx"
PARITY_IMAGES = 64


def write_generation(
    network: nn.Module,
    folder: Path,
    *,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    temperature: float,
    images_MHWC: NDArray[np.uint8],
    metrics: dict[str, Any],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Fill `folder` (which exists) with all files but the predictions; return the metrics with `onnx_parity` in them.

    `network` is in eval mode on the CPU. Parity between ONNX Runtime and torch is measured on `images_MHWC`, up to 64 of them.
    """
    models.save_network(network, folder, class_names=class_names, preprocessing=preprocessing)
    export_onnx(network, folder / ONNX, size=preprocessing.size)
    _write_json(folder / "preprocessing.json", preprocessing.to_dict())
    _write_json(folder / "class_names.json", list(class_names))
    _write_json(folder / "calibration.json", {"temperature": temperature})
    metrics = metrics | {"onnx_parity": onnx_parity(network, folder / ONNX, images_MHWC[:PARITY_IMAGES], preprocessing)}
    _write_json(folder / "metrics.json", metrics)
    card = model_card(metrics, class_names=class_names, preprocessing=preprocessing.to_dict(), temperature=temperature, lineage=lineage)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return metrics


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def export_onnx(network: nn.Module, path: Path, *, size: int) -> None:
    """Write the network as ONNX with a dynamic batch, its weights inside the one file."""
    example = torch.zeros(2, 3, size, size)
    with warnings.catch_warnings():
        # torch 2.15's exporter warns about its own internals (deprecated pytree names, constant folding); nothing of ours.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def onnx_parity(network: nn.Module, path: Path, images_MHWC: NDArray[np.uint8], preprocessing: Preprocessing) -> dict[str, Any]:
    """How far ONNX Runtime's probabilities lie from torch's (both fp32, on the CPU, before temperature) on these images."""
    import onnxruntime as ort

    if len(images_MHWC) == 0:
        return {"num_images": 0, "top1_agreement": None, "max_probability_difference": None}
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    runtime = RuntimeConfig(device="cpu", precision="fp32", num_threads=torch.get_num_threads(), num_loader_workers=0)
    theirs_MK = np.concatenate([session.run(None, {"images": normalize(part, preprocessing)})[0] for part in _parts(images_MHWC)])
    ours_MK = np.concatenate([forward(network, part, preprocessing, runtime) for part in _parts(images_MHWC)])
    difference = np.abs(calibration.softmax(theirs_MK) - calibration.softmax(ours_MK)).max()
    return {
        "num_images": len(images_MHWC),
        "top1_agreement": float((theirs_MK.argmax(-1) == ours_MK.argmax(-1)).mean()),
        "max_probability_difference": float(difference),
    }


def _parts(images_MHWC: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Batches of 16, so that a large network at 800 pixels fits into memory."""
    return [images_MHWC[start : start + 16] for start in range(0, len(images_MHWC), 16)]


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256, hex, of every file below `folder`, by its path relative to it, sorted."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
    return digests


def import_generation(
    source: Path,
    output_dir: Path,
    *,
    class_names: Sequence[str],
    image: ImageConfig | None = None,
    images_MHWC: NDArray[np.uint8] | None = None,
    lineage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Turn a timm folder (config.json + model.safetensors) into a generation's folder `output_dir`; return its metrics.

    `class_names` are those that the caller expects: ClassMismatch when the folder names others or has another number of
    outputs. WeightsError for a pickle, a damaged or an absent file. `image` says how images are prepared; None takes the
    folder's own preprocessing. Without `images_MHWC` parity is measured on random pixels and says so.
    """
    network = models.load_network(source)
    config = models.read_config(source)
    _check_classes(source, config, class_names)
    preprocessing = _preprocessing(source, config) if image is None else Preprocessing.from_config(image)
    synthetic = images_MHWC is None or len(images_MHWC) == 0
    if images_MHWC is None or synthetic:
        side = preprocessing.size
        images_MHWC = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    temperature = _temperature(source)
    metrics: dict[str, Any] = {
        "role": "imported",
        "architecture": config["architecture"],
        "num_parameters": models.count_parameters(network),
        "temperature": temperature,
        "validation": None,
        "test": None,
        "warnings": ["parity was measured on random pixels"] if synthetic else [],
    }
    with folder_written_aside(output_dir) as folder:
        return write_generation(
            network,
            folder,
            class_names=class_names,
            preprocessing=preprocessing,
            temperature=temperature,
            images_MHWC=images_MHWC,
            metrics=metrics,
            lineage=lineage or {},
        )


def _check_classes(source: Path, config: dict[str, Any], class_names: Sequence[str]) -> None:
    named = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if (source / "class_names.json").is_file():
        named = json.loads((source / "class_names.json").read_text(encoding="utf-8"))
    if named is not None and list(named) != list(class_names):
        raise ClassMismatch(
            f"the weights in {source} are for {len(named)} classes ({', '.join(map(str, list(named)[:5]))}, ...), "
            f"expected were {len(class_names)} ({', '.join(list(class_names)[:5])}, ...), in this order",
            found=list(named),
            expected=list(class_names),
        )
    if config.get("num_classes") != len(class_names):
        message = f"the weights in {source} tell {config.get('num_classes')} classes apart, expected were {len(class_names)}"
        raise ClassMismatch(message, found=config.get("num_classes"), expected=list(class_names))


def _preprocessing(source: Path, config: dict[str, Any]) -> Preprocessing:
    """The folder's own preprocessing: ours where it was exported by us, else what timm's config says."""
    own = source / "preprocessing.json"
    try:
        if own.is_file():
            return Preprocessing.from_dict(json.loads(own.read_text(encoding="utf-8")))
        timm_config = config["pretrained_cfg"]
        return Preprocessing(
            size=int(timm_config["input_size"][-1]),
            crop_ratio=float(timm_config.get("crop_pct", 0.875)),
            small_images=timm_config.get("crop_mode") == "squash",
            interpolation=timm_config.get("interpolation", "bicubic"),
            mean=tuple(map(float, timm_config["mean"])),  # type: ignore[arg-type]
            std=tuple(map(float, timm_config["std"])),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise WeightsError(f"{source} does not say how images are prepared ({error}): give an image config", folder=str(source)) from error


def _temperature(source: Path) -> float:
    path = source / "calibration.json"
    return float(json.loads(path.read_text(encoding="utf-8"))["temperature"]) if path.is_file() else 1.0
