"""The strong view: its shape, its randomness and what switches it off."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ml.config import ImageConfig, NoiseConfig
from ml.determinism import generator_for
from ml.pixels import Preprocessing, weak_view
from ml.transforms import random_resized_box, strong_view, training_preprocessing
from tests.ml.builders_images import build_image

SMALL = ImageConfig(size=32, small_images=True)
LARGE = ImageConfig(size=64)
SILENT = NoiseConfig(randaugment_operations=0)


def view(image: Image.Image, config: ImageConfig, noise: NoiseConfig, number: int = 0) -> npt.NDArray[np.uint8]:
    return strong_view(image, config, noise, generator_for(1, "view", number))


@pytest.mark.parametrize("config", [SMALL, LARGE])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (200, 31), (64, 300)])
def test_the_strong_view_is_a_writable_square_of_bytes(config: ImageConfig, size: tuple[int, int]) -> None:
    image = build_image(1, width=size[0], height=size[1])

    for noise in (NoiseConfig(), SILENT, NoiseConfig(randaugment_magnitude=27, extra_cutout_pixels=16), NoiseConfig(crop_and_flip=False)):
        pixels = view(image, config, noise)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (config.size, config.size, 3)
        assert pixels.flags.writeable


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_the_same_generator_gives_the_same_view_and_another_another(config: ImageConfig) -> None:
    image = build_image(1, width=48, height=40)

    assert (view(image, config, NoiseConfig()) == view(image, config, NoiseConfig())).all()
    assert len({view(image, config, NoiseConfig(), number).tobytes() for number in range(20)}) > 15


@pytest.mark.parametrize("config", [SMALL, LARGE, ImageConfig(size=64, evaluation_size=96)])
def test_without_any_noise_the_student_sees_the_weak_view(config: ImageConfig) -> None:
    image = build_image(1, width=100, height=80)

    pixels = view(image, config, NoiseConfig(randaugment_operations=0, crop_and_flip=False))

    assert (pixels == weak_view(image, Preprocessing.from_config(config, size=config.size))).all()
    assert training_preprocessing(config).size == config.size


def test_a_small_view_is_a_shifted_piece_of_the_reflected_image() -> None:
    image = build_image(1)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    pieces = {padded[y : y + 32, x : x + 32].tobytes() for x in range(9) for y in range(9)}
    mirrored = {padded[y : y + 32, x : x + 32][:, ::-1].tobytes() for x in range(9) for y in range(9)}

    seen = [view(image, SMALL, SILENT, number).tobytes() for number in range(600)]

    assert set(seen) <= pieces | mirrored
    assert 240 < sum(piece in mirrored for piece in seen) < 360
    assert len(set(seen)) > 150


def test_digits_are_never_mirrored() -> None:
    config = ImageConfig(size=32, small_images=True, flip=False, padding=0)
    image = build_image(1)

    assert all((view(image, config, SILENT, number) == np.asarray(image)).all() for number in range(50))


def test_the_extra_cutout_is_one_gray_square() -> None:
    white = Image.new("RGB", (32, 32), "white")

    areas = [
        int((view(white, SMALL, NoiseConfig(randaugment_operations=0, extra_cutout_pixels=16), n) == 128).all(-1).sum()) for n in range(200)
    ]

    assert max(areas) == 256
    assert min(areas) >= 64


@given(
    width=st.integers(1, 2000),
    height=st.integers(1, 2000),
    min_area=st.floats(0.01, 1),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_a_random_crop_lies_inside_and_is_never_empty(width: int, height: int, min_area: float, draws: list[float]) -> None:
    left, top, right, bottom = random_resized_box(width, height, min_area, draws)

    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_crops_cover_the_area_they_should() -> None:
    shares = []
    for number in range(2000):
        left, top, right, bottom = random_resized_box(400, 400, 0.25, generator_for(1, number).random(40).tolist())
        shares.append((right - left) * (bottom - top) / 160_000)

    assert min(shares) > 0.24
    assert max(shares) <= 1
    assert 0.5 < np.mean(shares) < 0.64


def test_transforms_reach_no_torch() -> None:
    code = "import ml.transforms, sys; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'pyarrow')))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
