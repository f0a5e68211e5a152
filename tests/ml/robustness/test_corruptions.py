"""Corruptions are as strong as the public ones, and the same for an image in whatever batch it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import DataError
from ml.robustness import blur, filters, frost, spatter, weather
from ml.robustness.corruptions import corrupt
from ml.robustness.draws import Draws
from ml.robustness.levels import to_levels
from ml.robustness.severities import CORRUPTIONS, EXTRA, GROUPS, LARGE, SEVERITIES, SMALL
from tests.ml.robustness.builders_photographs import build_photographs

ALL = (*CORRUPTIONS, *EXTRA)
REFERENCE = json.loads((Path(__file__).parent / "reference_changes.json").read_text(encoding="utf-8"))
# Without chance, our change is the reference's but for rounding.
EXACT = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
# The reference draws its numbers, and we ours; a few hundred draws each. Frost's textures are other pictures.
TOLERANCE = dict.fromkeys(ALL, 0.07) | dict.fromkeys(EXACT, 0.012) | {"frost": 0.1, "spatter": 0.12, "elastic_transform": 0.1}
PASSES = {32: 12, 96: 3}
RISING = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast", "jpeg_compression")


def corrupted(corruption: str, severity: int = 3, *, side: int = 32, seed: int = 1, passes: int = 1) -> npt.NDArray[np.uint8]:
    images = np.tile(build_photographs(side), (passes, 1, 1, 1))
    return corrupt(images, corruption, severity, seed=seed, indices=range(len(images)))


def mean_changes(corruption: str, *, side: int, passes: int) -> list[float]:
    images = np.tile(build_photographs(side), (passes, 1, 1, 1)).astype(np.int16)
    return [float(np.abs(corrupted(corruption, severity, side=side, passes=passes) - images).mean()) for severity in SEVERITIES]


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("corruption", ALL)
def test_the_mean_change_is_that_of_an_independent_implementation(corruption: str, side: int) -> None:
    changes = mean_changes(corruption, side=side, passes=1 if corruption in EXACT else PASSES[side])

    assert changes == pytest.approx(REFERENCE[str(side)][corruption], rel=TOLERANCE[corruption], abs=0.06)


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("corruption", RISING)
def test_these_change_more_with_each_severity(corruption: str, side: int) -> None:
    changes = mean_changes(corruption, side=side, passes=1)

    assert changes == sorted(changes)
    assert len(set(changes)) == 5


@pytest.mark.parametrize("corruption", ALL)
def test_an_image_comes_out_the_same_however_the_set_is_cut(corruption: str) -> None:
    images = np.tile(build_photographs(), (6, 1, 1, 1))
    whole = corrupt(images, corruption, 4, seed=5, indices=range(len(images)))

    cuts = [(0, 1), (1, 38), (38, 72)]
    parts = [corrupt(images[start:stop], corruption, 4, seed=5, indices=range(start, stop)) for start, stop in cuts]

    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("corruption", ALL)
def test_large_images_come_out_the_same_alone_and_together(corruption: str) -> None:
    images = build_photographs(96)[:3]
    whole = corrupt(images, corruption, 2, seed=5, indices=range(3))

    assert np.array_equal(corrupt(images[2:], corruption, 2, seed=5, indices=[2]), whole[2:])


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), corruption=st.sampled_from(ALL), severity=st.sampled_from(SEVERITIES))
def test_the_order_of_a_batch_does_not_matter(order: list[int], corruption: str, severity: int) -> None:
    images = build_photographs()
    in_order = corrupt(images, corruption, severity, seed=2, indices=range(12))

    assert np.array_equal(corrupt(images[order], corruption, severity, seed=2, indices=order), in_order[order])


def test_numpys_integers_name_the_same_draws_as_pythons() -> None:
    images = build_photographs()

    plain = corrupt(images, "gaussian_noise", 2, seed=7, indices=range(12))
    numpys = corrupt(images, "gaussian_noise", np.int64(2), seed=np.int64(7), indices=np.arange(12))  # type: ignore[arg-type]

    assert np.array_equal(plain, numpys)


@pytest.mark.parametrize("corruption", ALL)
def test_one_seed_gives_one_result(corruption: str) -> None:
    assert np.array_equal(corrupted(corruption), corrupted(corruption))


@pytest.mark.parametrize("corruption", [name for name in ALL if name not in EXACT])
def test_another_seed_severity_or_index_draws_other_numbers(corruption: str) -> None:
    images = np.repeat(build_photographs()[:1], 2, axis=0)

    one, beside = corrupt(images, corruption, 5, seed=1, indices=[0, 1])
    [other] = corrupt(images[:1], corruption, 5, seed=2, indices=[0])

    assert not np.array_equal(one, beside)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("corruption", ALL)
def test_the_images_that_go_in_stay_as_they_are(corruption: str) -> None:
    images = build_photographs().copy()

    result = corrupt(images, corruption, 5, seed=1, indices=range(12))

    assert np.array_equal(images, build_photographs())
    assert result.dtype == np.uint8
    assert result.shape == images.shape


@pytest.mark.parametrize("corruption", ALL)
@pytest.mark.parametrize("shape", [(33, 47), (70, 66)])
def test_images_need_not_be_square(corruption: str, shape: tuple[int, int]) -> None:
    images = np.ascontiguousarray(build_photographs(96)[:2, : shape[0], : shape[1]])

    for severity in SEVERITIES:
        assert corrupt(images, corruption, severity, seed=1, indices=[0, 1]).shape == images.shape


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize(
    "corruption", ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "contrast"]
)
def test_what_only_moves_pixels_leaves_a_plain_image_plain(corruption: str, level: int) -> None:
    plain = np.full((2, 32, 32, 3), level, np.uint8)

    assert (corrupt(plain, corruption, 5, seed=1, indices=[0, 1]) == level).all()


def test_up_to_64_pixels_have_cifars_constants_and_more_have_imagenets() -> None:
    black = {side: np.zeros((1, side, 80, 3), np.uint8) for side in (64, 65)}

    levels = {side: int(corrupt(images, "brightness", 1, seed=0, indices=[0]).max()) for side, images in black.items()}

    assert levels == {64: int(0.05 * 255), 65: int(0.1 * 255)}


def test_every_corruption_has_five_severities_in_both_sizes() -> None:
    assert set(LARGE) == set(SMALL) == set(ALL)
    assert {len(rows) for table in (LARGE, SMALL) for rows in table.values()} == {5}
    assert (len(CORRUPTIONS), len(EXTRA), len(GROUPS)) == (15, 4, 5)


@pytest.mark.parametrize(
    ("corruption", "severity", "kernel"),
    [
        ("motion_blur", 5, 19),
        ("snow", 5, 29),
        ("gaussian_blur", 5, 9),
        ("defocus_blur", 5, 3),
        ("glass_blur", 5, 5),
        ("spatter", 3, 9),
        ("pixelate", 5, 2),
        ("elastic_transform", 1, 3),
    ],
)
def test_an_image_smaller_than_the_kernel_is_refused(corruption: str, severity: int, kernel: int) -> None:
    fits, too_small = (np.zeros((1, height, 40, 3), np.uint8) for height in (kernel, kernel - 1))

    corrupt(fits, corruption, severity, seed=0, indices=[0])
    with pytest.raises(DataError, match=rf"{corruption} at severity {severity} .* {kernel} x {kernel} .* {kernel - 1} x 40") as refused:
        corrupt(too_small, corruption, severity, seed=0, indices=[0])

    assert refused.value.details["kernel_pixels"] == kernel


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), "must be uint8 of shape .* got float32"),
        (np.zeros((32, 32, 3), np.uint8), r"got uint8 of \[32, 32, 3\]"),
        (np.zeros((1, 32, 32, 1), np.uint8), r"got uint8 of \[1, 32, 32, 1\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), "got 1 for 2 images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: npt.NDArray[Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        corrupt(images, "fog", 1, seed=0, indices=[0])


def test_unknown_corruptions_and_severities_are_refused_with_what_is_known() -> None:
    images = build_photographs()[:1]

    with pytest.raises(DataError, match="no corruption 'rain'; known: gaussian_noise, shot_noise"):
        corrupt(images, "rain", 1, seed=0, indices=[0])
    with pytest.raises(DataError, match="from 1 to 5, got 6"):
        corrupt(images, "fog", 6, seed=0, indices=[0])


def test_no_image_gives_no_image() -> None:
    assert corrupt(np.zeros((0, 32, 32, 3), np.uint8), "snow", 1, seed=0, indices=[]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("radius_softness", [(1, 0.2), (10, 0.5)])
def test_a_long_filter_and_a_short_one_are_the_same_sum(radius_softness: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    levels = to_levels(build_photographs(96)[:1])
    kernel = blur.disk(*radius_softness)

    found = []
    for most_taps in (0, 10_000):
        monkeypatch.setattr(filters, "_LONG", most_taps)
        found.append(filters.convolve(levels, kernel))

    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("sigma", [0.9, 4.0, 30.0])
def test_fields_are_smoothed_as_if_mirrored_without_end(sigma: float) -> None:
    field = np.random.default_rng(5).normal(size=(1, 12, 9))
    weights = filters.gaussian_weights(sigma, truncate=3)
    reach = len(weights) // 2

    found = filters.smooth_fields(field, sigma, truncate=3)

    padded = np.pad(field[0], reach, mode="symmetric")
    rows = np.apply_along_axis(np.convolve, 0, padded, weights, mode="valid")
    np.testing.assert_allclose(found[0], np.apply_along_axis(np.convolve, 1, rows, weights, mode="valid"), atol=1e-12)


def one_by_one(pixels: npt.NDArray[np.intp], steps: npt.NDArray[np.intp], shift: int) -> npt.NDArray[np.intp]:
    """Glass as the public code does it: from the last pixel to the first, each takes over the one that it is moved to."""
    pixels = pixels.copy()
    height, width = pixels.shape
    for row in range(height - shift, shift, -1):
        for column in range(width - shift, shift, -1):
            pixels[row, column] = pixels[row + steps[0, row, column], column + steps[1, row, column]]
    return pixels


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_glass_moves_all_pixels_at_once_where_they_end_up_one_by_one(shift: int) -> None:
    steps = np.random.default_rng(shift).integers(-shift, shift, (2, 40, 30))
    numbers = np.arange(40 * 30).reshape(40, 30)

    [sources] = blur._taken_from(steps[:1], steps[1:], shift)

    assert np.array_equal(sources, one_by_one(numbers, steps, shift))


def test_plasma_fills_0_to_1_and_is_smoother_with_more_decay() -> None:
    rough, smooth = (weather.plasma(Draws([1, 2], 0, "fog"), 32, decay) for decay in (1.5, 3))

    assert rough.min() == smooth.min() == 0
    assert rough.max() == smooth.max() == 1
    assert np.abs(np.diff(rough, axis=1)).mean() > 1.5 * np.abs(np.diff(smooth, axis=1)).mean()


def test_frost_textures_have_the_tones_of_the_public_ones() -> None:
    for made, (*tone, deviation) in zip(frost.textures(small=False), frost._TONES, strict=True):
        np.testing.assert_allclose(made.mean(axis=(0, 1)), tone, atol=2)
        np.testing.assert_allclose(made.std(axis=(0, 1)), deviation, rtol=0.08)


def test_frost_covers_images_larger_than_its_textures() -> None:
    image = np.zeros((1, 520, 600, 3), np.uint8)

    assert corrupt(image, "frost", 3, seed=0, indices=[0]).min() > 0


def test_canny_finds_the_border_of_a_square_one_pixel_wide() -> None:
    drops = np.zeros((20, 20), np.uint8)
    drops[6:14, 6:14] = 200

    found = spatter.edges(drops)

    assert found.sum(axis=1).max() <= 10
    assert found[10].sum() == 2
    assert not found[9:11, 9:11].any()


def test_distances_to_edges_are_exact_up_to_20() -> None:
    edges = np.zeros((50, 50), bool)
    edges[3, 4] = True

    found = spatter.distances(edges)

    rows, columns = np.indices((50, 50))
    np.testing.assert_allclose(found, np.minimum(np.hypot(rows - 3, columns - 4), 20), rtol=1e-6)
