"""The public robustness data sets as they lie on a disk: ImageNet-C, -A and -R, CIFAR-10-C and -P.

Nothing is fetched. A folder gives paths and labels, to be decoded by `ml.pixels` like any other image; an array gives a memory
map. ImageNet-P lies in films, for which there is no decoder here. N images, T frames, H W rows and columns, C channels, K classes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.errors import ClassMismatch, DataError, NoImages
from ml.robustness.baselines import PERTURBATIONS
from ml.robustness.severities import CORRUPTIONS, GROUPS, SEVERITIES

SMALL_PERTURBATIONS = tuple("spatter" if name == "snow" else name for name in PERTURBATIONS)
"""CIFAR-10-P's."""
Subset = Literal["imagenet-a", "imagenet-r"]
_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
_NUM_IMAGENET_CLASSES = 1000


class FolderPart(NamedTuple):
    """The image files of one corruption at one severity."""

    corruption: str
    severity: int
    paths: list[Path]
    labels_N: NDArray[np.int64]
    """Places in the class names that were asked for."""


class ArrayPart(NamedTuple):
    """The images of one corruption at one severity, as a memory map."""

    corruption: str
    severity: int
    images_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]


class Sequences(NamedTuple):
    """The sequences of one perturbation, as a memory map."""

    perturbation: str
    frames_NTHWC: NDArray[np.uint8]


def imagenet_c(root: Path, class_names: Sequence[str], corruptions: Sequence[str] = CORRUPTIONS) -> Iterator[FolderPart]:
    """`<corruption>/<severity>/<class>/*.JPEG`, also grouped under noise, blur, weather, digital and extra; in order of severity.

    `class_names` are the network's, in its order: every class folder must be one of them. Looks for everything before the first
    part: DataError names every corruption and severity that is not there.
    """
    folders = {(name, severity): _folder_of(root, name) / str(severity) for name in corruptions for severity in SEVERITIES}
    _check_there(root, [key for key, folder in folders.items() if not folder.is_dir()])
    return (FolderPart(*key, *class_folders(folder, class_names)) for key, folder in folders.items())


def _folder_of(root: Path, corruption: str) -> Path:
    grouped = [root / group / corruption for group, names in GROUPS.items() if corruption in names]
    return next((path for path in grouped if path.is_dir()), root / corruption)


def _check_there(root: Path, missing: Sequence[tuple[str, int]]) -> None:
    if not missing:
        return
    severities = {name: [severity for other, severity in missing if other == name] for name, _ in missing}
    listed = "; ".join(
        name if len(found) == len(SEVERITIES) else f"{name} at severity {', '.join(map(str, found))}" for name, found in severities.items()
    )
    raise DataError(f"{root} lacks {listed}", missing=severities)


def class_folders(root: Path, class_names: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """Image files below `root`, one folder a class, sorted; and their labels, places in `class_names`.

    ClassMismatch for folders that are no class of the network, NoImages for none at all. A class without a folder is allowed.
    """
    if not root.is_dir():
        raise NoImages(f"there is no folder {root}")
    place = {name: index for index, name in enumerate(class_names)}
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    unknown = [name for name in found if name not in place]
    if unknown:
        raise ClassMismatch(
            f"{root} has {len(unknown)} folders that are no class of the network, as {', '.join(unknown[:5])}", unknown=unknown
        )
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        files = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
        paths += files
        labels += [place[name]] * len(files)
    if not paths:
        raise NoImages(f"no image in the class folders of {root}")
    return paths, np.asarray(labels, np.int64)


class SubsetIndices(NamedTuple):
    """Which 200 of ImageNet's 1000 classes a test set has."""

    synsets: tuple[str, ...]
    """WordNet ids, the names of the class folders, sorted."""
    indices: NDArray[np.int64]
    """Their places among the 1000 logits."""


def subset_indices(subset: Subset) -> SubsetIndices:
    """The lists that timm ships (timm/data/_info), read as files: timm itself is not imported."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the class list of {subset} comes with timm, which is not installed")
    folder = Path(found.submodule_search_locations[0]) / "data" / "_info"
    name = subset.replace("-", "_")
    synsets = (folder / f"{name}_synsets.txt").read_text(encoding="utf-8").split()
    indices = (folder / f"{name}_indices.txt").read_text(encoding="utf-8").split()
    return SubsetIndices(tuple(synsets), np.asarray(indices, np.int64))


def slice_logits(logits_NK: NDArray[np.floating[Any]], subset: Subset) -> NDArray[np.floating[Any]]:
    """The 200 logits [N, 200] of the subset's classes, in the order of its synsets: to be taken *before* argmax and softmax.

    An answer among the other 800 classes is no answer that the test set allows. ClassMismatch unless there are 1000 logits.
    """
    if logits_NK.shape[-1] != _NUM_IMAGENET_CLASSES:
        raise ClassMismatch(f"{subset} takes 200 of ImageNet's 1000 logits, this network has {logits_NK.shape[-1]}")
    return logits_NK[..., subset_indices(subset).indices]


def imagenet_subset(root: Path, subset: Subset) -> tuple[list[Path], NDArray[np.int64]]:
    """ImageNet-A's or -R's files and their labels among the 200 classes of `slice_logits`."""
    return class_folders(root, subset_indices(subset).synsets)


def cifar_c(root: Path, corruptions: Sequence[str] = CORRUPTIONS) -> Iterator[ArrayPart]:
    """CIFAR-10-C (and -100-C): `<corruption>.npy` of 5 blocks of images, one a severity, beside `labels.npy`.

    Looks for everything before the first part; DataError names the files that are not there or hold something else.
    """
    missing = [name for name in ("labels", *corruptions) if not (root / f"{name}.npy").is_file()]
    if missing:
        raise DataError(f"{root} lacks {', '.join(f'{name}.npy' for name in missing)}", missing=missing)
    labels = _open(root / "labels.npy")
    arrays = {name: _open(root / f"{name}.npy") for name in corruptions}
    for name, images in arrays.items():
        _check_blocks(root / f"{name}.npy", images, labels)
    return (
        ArrayPart(name, severity, images[block], np.asarray(labels[block], np.int64))
        for name, images in arrays.items()
        for severity, block in zip(SEVERITIES, _blocks(len(images)), strict=True)
    )


def _check_blocks(path: Path, images: NDArray[Any], labels: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(f"{path} must hold uint8 images [N, H, W, 3], it holds {images.dtype} {list(images.shape)}")
    if labels.ndim != 1 or len(labels) == 0 or len(labels) % len(SEVERITIES):
        raise DataError(
            f"labels.npy beside {path} must hold 5 blocks of equally many labels, one a severity; it holds {list(labels.shape)}"
        )
    lacking = [severity for severity, block in zip(SEVERITIES, _blocks(len(labels)), strict=True) if block.stop > len(images)]
    if lacking or len(images) > len(labels):
        which = f"severity {', '.join(map(str, lacking))} is not all there" if lacking else "there are more images than labels"
        raise DataError(f"{path} holds {len(images)} images and labels.npy {len(labels)} labels: {which}", missing={path.stem: lacking})


def _blocks(length: int) -> list[slice]:
    block = length // len(SEVERITIES)
    return [slice(block * at, block * (at + 1)) for at in range(len(SEVERITIES))]


def cifar_p(root: Path, perturbations: Sequence[str] = SMALL_PERTURBATIONS) -> Iterator[Sequences]:
    """CIFAR-10-P (and -100-P): `<perturbation>.npy` of frames [N, T, H, W, 3]; DataError names what is not there."""
    missing = [name for name in perturbations if not (root / f"{name}.npy").is_file()]
    if missing:
        raise DataError(f"{root} lacks {', '.join(f'{name}.npy' for name in missing)}", missing=missing)
    arrays = {name: _open(root / f"{name}.npy") for name in perturbations}
    for name, frames in arrays.items():
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise DataError(f"{root / name}.npy must hold uint8 frames [N, T, H, W, 3], it holds {frames.dtype} {list(frames.shape)}")
    return (Sequences(name, frames) for name, frames in arrays.items())


def _open(path: Path) -> NDArray[Any]:
    try:
        # Never pickled: an array of objects could run what it likes.
        opened: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is no array of numbers that numpy can map: {error}") from error
    return opened
