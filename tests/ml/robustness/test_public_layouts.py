"""The public data sets are read as they lie, and what is missing is named before anything is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ml.errors import ClassMismatch, DataError, NoImages
from ml.robustness.layouts import (
    SMALL_PERTURBATIONS,
    cifar_c,
    cifar_p,
    class_folders,
    imagenet_c,
    imagenet_subset,
    slice_logits,
    subset_indices,
)
from ml.robustness.severities import CORRUPTIONS, GROUPS, SEVERITIES

CLASSES = ("n02", "n01")


def write_imagenet_c(root: Path, *, grouped: bool = False) -> Path:
    for group, names in GROUPS.items():
        for name in names:
            for severity in SEVERITIES:
                folder = (root / group / name if grouped else root / name) / str(severity)
                for class_name, count in (("n01", 1), ("n02", 2)):
                    (folder / class_name).mkdir(parents=True)
                    for number in range(count):
                        (folder / class_name / f"{number}.JPEG").touch()
    return root


def write_cifar_c(root: Path, *, images: int = 20, labels: int = 20) -> Path:
    for number, name in enumerate(CORRUPTIONS):
        np.save(root / f"{name}.npy", np.full((images, 4, 4, 3), number, np.uint8))
    np.save(root / "labels.npy", np.tile(np.arange(4, dtype=np.uint8), labels // 4))
    return root


@pytest.mark.parametrize("grouped", [False, True])
def test_imagenet_c_is_read_flat_and_grouped(tmp_path: Path, grouped: bool) -> None:
    write_imagenet_c(tmp_path, grouped=grouped)

    parts = list(imagenet_c(tmp_path, CLASSES))

    assert [(part.corruption, part.severity) for part in parts] == [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    assert [(path.parent.name, path.name) for path in parts[7].paths] == [("n01", "0.JPEG"), ("n02", "0.JPEG"), ("n02", "1.JPEG")]
    assert parts[7].labels_N.tolist() == [1, 0, 0]


def test_extra_corruptions_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    write_imagenet_c(tmp_path, grouped=True)

    [first, *_] = imagenet_c(tmp_path, CLASSES, GROUPS["extra"])

    assert first.paths[0].relative_to(tmp_path).as_posix() == "extra/speckle_noise/1/n01/0.JPEG"


def test_missing_severities_of_imagenet_c_are_named(tmp_path: Path) -> None:
    write_imagenet_c(tmp_path)
    for severity in (2, 5):
        (tmp_path / "fog" / str(severity)).rename(tmp_path / f"fog-{severity}")
    (tmp_path / "frost").rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"lacks frost; fog at severity 2, 5$") as refused:
        imagenet_c(tmp_path, CLASSES)

    assert refused.value.details["missing"] == {"frost": [1, 2, 3, 4, 5], "fog": [2, 5]}


def test_folders_that_are_no_class_are_refused(tmp_path: Path) -> None:
    write_imagenet_c(tmp_path)

    with pytest.raises(ClassMismatch, match="1 folders that are no class of the network, as n02"):
        next(imagenet_c(tmp_path, ("n01",)))


def test_a_folder_without_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "README").touch()

    with pytest.raises(NoImages, match="no image in the class folders"):
        class_folders(tmp_path, CLASSES)
    with pytest.raises(NoImages, match="no folder"):
        class_folders(tmp_path / "absent", CLASSES)


@pytest.mark.parametrize("subset", ["imagenet-a", "imagenet-r"])
def test_a_subset_is_sliced_out_of_the_logits_before_the_argmax(subset: str) -> None:
    synsets, indices = subset_indices(subset)  # type: ignore[arg-type]
    logits_NK = np.zeros((1, 1000))
    outside = next(index for index in range(1000) if index not in set(indices.tolist()))
    logits_NK[0, outside], logits_NK[0, indices[17]] = 9, 5

    sliced_NK = slice_logits(logits_NK, subset)  # type: ignore[arg-type]

    assert (len(synsets), sliced_NK.shape) == (200, (1, 200))
    assert sliced_NK.argmax() == 17


def test_the_subsets_synsets_stand_in_the_order_of_imagenets_own() -> None:
    for subset in ("imagenet-a", "imagenet-r"):
        synsets, indices = subset_indices(subset)  # type: ignore[arg-type]

        assert list(synsets) == sorted(synsets)
        assert np.all(np.diff(indices) > 0)
        assert indices.max() < 1000


def test_a_network_of_other_classes_has_no_imagenet_subset() -> None:
    with pytest.raises(ClassMismatch, match="1000 logits, this network has 10"):
        slice_logits(np.zeros((2, 10)), "imagenet-a")


def test_the_files_of_imagenet_a_get_labels_among_its_200_classes(tmp_path: Path) -> None:
    synsets = subset_indices("imagenet-a").synsets
    for name in (synsets[3], synsets[199]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").touch()

    paths, labels_N = imagenet_subset(tmp_path, "imagenet-a")

    assert [path.parent.name for path in paths] == [synsets[3], synsets[199]]
    assert labels_N.tolist() == [3, 199]


def test_cifar_c_is_five_blocks_of_images_a_file(tmp_path: Path) -> None:
    write_cifar_c(tmp_path)

    parts = list(cifar_c(tmp_path))

    assert [(part.corruption, part.severity) for part in parts] == [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    assert {part.images_NHWC.shape for part in parts} == {(4, 4, 4, 3)}
    assert [int(part.images_NHWC[0, 0, 0, 0]) for part in parts[::5]] == list(range(15))
    assert parts[-1].labels_N.tolist() == [0, 1, 2, 3]
    assert isinstance(parts[0].images_NHWC, np.memmap)


def test_missing_severities_of_cifar_c_are_named(tmp_path: Path) -> None:
    write_cifar_c(tmp_path, images=11)

    with pytest.raises(
        DataError, match=r"gaussian_noise.npy holds 11 images and labels.npy 20 labels: severity 3, 4, 5 is not all there"
    ) as refused:
        cifar_c(tmp_path)

    assert refused.value.details["missing"] == {"gaussian_noise": [3, 4, 5]}


def test_missing_files_of_cifar_c_and_p_are_named(tmp_path: Path) -> None:
    write_cifar_c(tmp_path)
    (tmp_path / "snow.npy").unlink()
    (tmp_path / "labels.npy").unlink()

    with pytest.raises(DataError, match=r"lacks labels.npy, snow.npy$"):
        cifar_c(tmp_path)
    with pytest.raises(DataError, match=r"lacks spatter.npy, translate.npy, rotate.npy, tilt.npy, scale.npy$"):
        cifar_p(tmp_path)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    write_cifar_c(tmp_path)

    np.save(tmp_path / "fog.npy", np.zeros((20, 4, 4, 3), np.float32))
    with pytest.raises(DataError, match=r"fog.npy must hold uint8 images \[N, H, W, 3\], it holds float32"):
        cifar_c(tmp_path)
    with pytest.raises(DataError, match=r"snow.npy must hold uint8 frames \[N, T, H, W, 3\]"):
        cifar_p(tmp_path, ["snow"])
    (tmp_path / "fog.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"fog.npy is no array of numbers"):
        cifar_c(tmp_path)


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    write_cifar_c(tmp_path)
    np.save(tmp_path / "labels.npy", np.array([{}] * 20, object), allow_pickle=True)

    with pytest.raises(DataError, match=r"labels.npy is no array of numbers"):
        cifar_c(tmp_path)


def test_cifar_p_is_frames_a_file(tmp_path: Path) -> None:
    for name in SMALL_PERTURBATIONS:
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 3, 4, 4, 3), np.uint8))

    found = list(cifar_p(tmp_path))

    assert [sequences.perturbation for sequences in found] == list(SMALL_PERTURBATIONS)
    assert found[0].frames_NTHWC.shape == (2, 3, 4, 4, 3)
