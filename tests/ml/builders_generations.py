"""Untrained generations and manifests to show them, small and the same on every call."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ml.config import ImageConfig, NetworkConfig, NoiseConfig, RuntimeConfig
from ml.export import write_generation
from ml.files import folder_written_aside
from ml.ingestion import scan
from ml.manifest import Kind, Manifest
from ml.models import count_parameters, create_network
from ml.pixels import Preprocessing

RUNTIME = RuntimeConfig(device="cpu", precision="fp32", num_threads=1, num_loader_workers=1)
IMAGE = ImageConfig(size=32, small_images=True, flip=False)


def build_generation(folder: Path, *, class_names: tuple[str, ...] = ("blue", "red"), temperature: float = 1.5, seed: int = 0) -> Path:
    """A `test_resnet` with random weights, dropout and 32-pixel images, exported to `folder`."""
    built = _export_once(class_names, temperature, seed)
    shutil.copytree(Path(built.name) / "generation", folder)
    return folder


@cache
def _export_once(class_names: tuple[str, ...], temperature: float, seed: int) -> TemporaryDirectory[str]:
    """An export costs seconds: made once per process, copied for each test, removed at the end."""
    torch.manual_seed(seed)
    network = create_network(
        NetworkConfig(architecture="test_resnet"), num_classes=len(class_names), noise=NoiseConfig(dropout=0.5), image=IMAGE
    )
    images = np.random.default_rng(0).integers(0, 256, (4, IMAGE.size, IMAGE.size, 3), dtype=np.uint8)
    facts = {"role": "teacher", "iteration": 0, "architecture": "test_resnet", "num_parameters": count_parameters(network)}
    built: TemporaryDirectory[str] = TemporaryDirectory()
    with folder_written_aside(Path(built.name) / "generation") as aside:
        write_generation(
            network.eval(),
            aside,
            class_names=class_names,
            preprocessing=Preprocessing.from_config(IMAGE),
            temperature=temperature,
            images_MHWC=images,
            metrics=facts,
            lineage={"run": "r_1"},
        )
    atexit.register(built.cleanup)
    return built


def build_manifest(root: Path, path: Path, *, kind: Kind) -> Manifest:
    """Scan `root` and leave its manifest at `path`."""
    manifest, _ = scan(root, kind=kind)
    manifest.write(path)
    return manifest
