"""Perturbation sequences move an image as the public ones do, and are the same however the set is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ml.errors import DataError
from ml.robustness.baselines import PERTURBATIONS
from ml.robustness.layouts import SMALL_PERTURBATIONS, cifar_p
from ml.robustness.perturbations import num_frames, perturb, tilt_inverse, write_sequences
from tests.ml.robustness.builders_photographs import build_photographs

ALL = (*PERTURBATIONS, "spatter")
DRAWN = ("gaussian_noise", "shot_noise", "snow", "spatter")


def frames_of(perturbation: str, *, side: int = 32, count: int = 2, size: int | None = None) -> npt.NDArray[np.uint8]:
    return perturb(build_photographs(side)[:count], perturbation, seed=3, indices=range(count), size=size)


@pytest.mark.parametrize("perturbation", ALL)
@pytest.mark.parametrize("side", [32, 72])
def test_a_sequence_has_the_public_number_of_frames(perturbation: str, side: int) -> None:
    special = {32: {"translate": 16, "motion_blur": 21}, 72: {"translate": 41}}[side]

    frames = frames_of(perturbation, side=side, count=1)

    assert frames.shape == (1, special.get(perturbation, 31), side, side, 3)
    assert num_frames(perturbation, side=side) == frames.shape[1]


@pytest.mark.parametrize("perturbation", ALL)
def test_a_sequence_is_the_same_however_the_set_is_cut(perturbation: str) -> None:
    whole = frames_of(perturbation, count=3)

    [alone] = perturb(build_photographs()[2:3], perturbation, seed=3, indices=[2])

    assert np.array_equal(alone, whole[2])


@pytest.mark.parametrize("perturbation", DRAWN)
def test_another_seed_or_index_draws_another_sequence(perturbation: str) -> None:
    image = build_photographs()[:1]

    one, *others = (perturb(image, perturbation, seed=seed, indices=[index]) for seed, index in ((1, 0), (2, 0), (1, 1)))

    assert all(not np.array_equal(one, other) for other in others)


@pytest.mark.parametrize("perturbation", ["gaussian_noise", "shot_noise", "zoom_blur"])
def test_the_first_frame_is_the_image_itself(perturbation: str) -> None:
    assert np.array_equal(frames_of(perturbation)[:, 0], build_photographs()[:2])


@pytest.mark.parametrize(("perturbation", "at"), [("brightness", 15), ("translate", 7), ("rotate", 15), ("tilt", 15), ("scale", 15)])
def test_in_the_middle_the_image_stands_as_it_is(perturbation: str, at: int) -> None:
    middle = frames_of(perturbation)[:, at].astype(np.int16)

    # Tilt's plane stands one pixel behind the picture's, as in the public code: the picture is a 45th smaller.
    assert np.abs(middle - build_photographs()[:2]).mean() < (8 if perturbation == "tilt" else 0.01)


@pytest.mark.parametrize("at", [0, 9, 30])
@pytest.mark.parametrize("perturbation", ["rotate", "scale"])
def test_turning_and_scaling_are_torchvisions(perturbation: str, at: int) -> None:
    image = Image.fromarray(build_photographs()[0])
    options = {"rotate": {"angle": at - 15, "scale": 1.0}, "scale": {"angle": 0, "scale": 0.7 + 0.02 * at}}[perturbation]

    frame = frames_of(perturbation)[0, at]

    wanted = transforms.affine(image, translate=[0, 0], shear=[0.0], interpolation=InterpolationMode.BILINEAR, **options)  # type: ignore[arg-type]
    assert np.abs(frame.astype(np.int16) - np.asarray(wanted)).mean() < 0.05


def test_translation_goes_a_pixel_a_frame_and_leaves_black() -> None:
    frames = frames_of("translate")

    assert np.array_equal(frames[:, 1:, :, 1:], frames[:, :-1, :, :-1])
    assert not frames[:, 15, :, :8].any()


def test_with_a_size_the_picture_comes_in_from_beyond_the_border() -> None:
    images = build_photographs(96)[:1]

    frames = perturb(images, "translate", seed=0, indices=[0], size=72)

    assert frames.shape == (1, 41, 72, 72, 3)
    assert np.array_equal(frames[0, 20], images[0, 12:84, 12:84])
    assert np.array_equal(frames[0, 10], images[0, 12:84, 22:94])


def test_tilt_maps_the_center_onto_itself_and_one_side_farther_away() -> None:
    a, b, c, d, e, f, g, h = tilt_inverse(64, 64, 10)

    def source(x: float, y: float) -> tuple[float, float]:
        far = g * x + h * y + 1
        return (a * x + b * y + c) / far, (d * x + e * y + f) / far

    assert source(32.5, 32.5) == pytest.approx((32.5, 32.5), abs=0.3)
    near, far = (np.subtract(source(*corner), 32.5) for corner in ((0.5, 0.5), (64.5, 64.5)))
    assert abs(np.hypot(*near) - np.hypot(*far)) > 3


def test_noise_is_drawn_anew_each_frame_and_as_strong_as_the_public() -> None:
    gray = np.full((1, 32, 32, 3), 128, np.uint8)

    gaussian, shot = (perturb(gray, name, seed=0, indices=[0])[0, 1:].astype(np.float64) for name in ("gaussian_noise", "shot_noise"))

    assert gaussian.std() == pytest.approx(0.02 * 255, rel=0.02)
    assert shot.std() == pytest.approx(255 * np.sqrt(128 / 255 / 700), rel=0.02)
    assert np.abs(np.corrcoef(gaussian.reshape(30, -1)) - np.eye(30)).max() < 0.1


def test_water_runs_down_and_none_comes_from_above() -> None:
    black = np.zeros((1, 32, 32, 3), np.uint8)

    water = perturb(black, "spatter", seed=1, indices=[0])[0].any(axis=-1)

    assert water[0].any()
    assert not water[30, :10].any()


def test_neighboring_frames_differ_less_than_distant_ones() -> None:
    for name in ("snow", "brightness", "rotate", "scale", "tilt", "zoom_blur", "motion_blur"):
        frames = frames_of(name, count=1)[0].astype(np.int16)

        assert np.abs(frames[10] - frames[11]).mean() < np.abs(frames[10] - frames[20]).mean()


def test_written_sequences_are_those_in_memory_and_read_as_cifar_10_p(tmp_path: Path) -> None:
    images = np.tile(build_photographs(), (6, 1, 1, 1))[:70]

    written = write_sequences(tmp_path / "brightness.npy", images, "brightness", seed=1, indices=range(70))

    assert np.array_equal(written, perturb(images, "brightness", seed=1, indices=range(70)))
    [(name, frames)] = cifar_p(tmp_path, ["brightness"])
    assert (name, frames.shape) == ("brightness", (70, 31, 32, 32, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["brightness.npy"]


def test_cifars_sequences_have_spatter_in_place_of_snow() -> None:
    assert set(PERTURBATIONS) ^ set(SMALL_PERTURBATIONS) == {"snow", "spatter"}


@pytest.mark.parametrize(("perturbation", "kernel"), [("motion_blur", 13), ("snow", 21), ("spatter", 15)])
def test_a_frame_smaller_than_the_kernel_is_refused(perturbation: str, kernel: int) -> None:
    image = np.zeros((1, kernel - 1, kernel - 1, 3), np.uint8)

    with pytest.raises(DataError, match=rf"{perturbation} needs images of at least {kernel} x {kernel}"):
        perturb(image, perturbation, seed=0, indices=[0])


def test_unknown_perturbations_and_frames_larger_than_images_are_refused() -> None:
    with pytest.raises(DataError, match="no perturbation 'shear'; known: gaussian_noise"):
        frames_of("shear")
    with pytest.raises(DataError, match="frames of 48 x 48 pixels cannot be cut out of images of 32 x 32"):
        frames_of("rotate", size=48)
