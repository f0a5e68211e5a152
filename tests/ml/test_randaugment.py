"""RandAugment does what the paper's code does, at every magnitude, on every size."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from ml import randaugment as module
from ml.randaugment import OPERATIONS, apply, operation_arguments, randaugment, reach
from tests.ml.builders_images import build_image

GOLDEN = {
    # Rotate, Posterize, Solarize, blends, Shear, Translate, Cutout, SolarizeAdd
    5: (15.0, 2, 128, 1.0, 0.15, 50.0, 20, 55),
    9: (27.0, 3, 230, 1.72, 0.27, 90.0, 36, 99),
    18: (54.0, 7, 256, 3.34, 0.54, 180.0, 72, 198),
    27: (81.0, 8, 256, 4.96, 0.81, 270.0, 108, 297),
}


def augment(image: Image.Image, seed: int = 0, **options: float) -> Image.Image:
    settings_: dict[str, float] = {"operations": 2, "magnitude": 9, "translate_pixels": 4, "cutout_pixels": 4} | options
    return randaugment(image, generator=np.random.default_rng(seed), **settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("magnitude", GOLDEN)
def test_arguments_are_the_papers(magnitude: int) -> None:
    arguments = operation_arguments(magnitude, translate_pixels=100, cutout_pixels=40)

    rotate, posterize, solarize, blend, shear, translate, cutout, add = GOLDEN[magnitude]
    assert {name: round(value, 9) for name, value in arguments.items()} == {
        "AutoContrast": 0,
        "Equalize": 0,
        "Invert": 0,
        "Rotate": rotate,
        "Posterize": posterize,
        "Solarize": solarize,
        "Color": blend,
        "Contrast": blend,
        "Brightness": blend,
        "Sharpness": blend,
        "ShearX": shear,
        "ShearY": shear,
        "TranslateX": translate,
        "TranslateY": translate,
        "Cutout": cutout,
        "SolarizeAdd": add,
    }


def test_there_are_sixteen_operations() -> None:
    assert len(set(OPERATIONS)) == 16


@pytest.mark.parametrize("size", [(32, 32), (37, 21)])
@pytest.mark.parametrize("number", range(3))
def test_pixels_are_pillows(size: tuple[int, int], number: int) -> None:
    image = build_image(number, width=size[0], height=size[1])
    references = {
        ("AutoContrast", 0.0): ImageOps.autocontrast(image),
        ("Equalize", 0.0): ImageOps.equalize(image),
        ("Invert", 0.0): ImageOps.invert(image),
        ("Posterize", 3.0): ImageOps.posterize(image, 3),
        ("Solarize", 100.0): ImageOps.solarize(image, 100),
        ("Color", 1.72): ImageEnhance.Color(image).enhance(1.72),
        ("Contrast", 1.72): ImageEnhance.Contrast(image).enhance(1.72),
        ("Contrast", 0.4): ImageEnhance.Contrast(image).enhance(0.4),
        ("Brightness", 1.72): ImageEnhance.Brightness(image).enhance(1.72),
        ("Sharpness", 1.72): ImageEnhance.Sharpness(image).enhance(1.72),
    }

    for (name, argument), reference in references.items():
        assert apply(image, name, argument).tobytes() == reference.tobytes(), name


def test_plain_images_survive_equalize_and_autocontrast() -> None:
    plain = Image.new("RGB", (8, 8), (10, 20, 30))

    assert apply(plain, "Equalize", 0).tobytes() == plain.tobytes()
    assert apply(plain, "AutoContrast", 0).tobytes() == plain.tobytes()


def test_what_is_left_empty_is_gray_128() -> None:
    white = Image.new("RGB", (32, 32), "white")

    for name, argument in (("Rotate", 45), ("ShearX", 0.5), ("ShearY", -0.5), ("TranslateX", 7), ("TranslateY", -7), ("Cutout", 4)):
        levels = set(np.asarray(apply(white, name, argument)).reshape(-1).tolist())
        assert levels == {128, 255}, name


def test_translation_moves_by_its_pixels() -> None:
    image = build_image(1)

    moved = np.asarray(apply(image, "TranslateX", 5))

    assert (moved[:, :27] == np.asarray(image)[:, 5:]).all()
    assert (moved[:, 27:] == 128).all()


def test_cutout_is_cut_off_at_the_border() -> None:
    white = Image.new("RGB", (32, 32), "white")

    assert (np.asarray(apply(white, "Cutout", 4, x=0.0, y=0.0)) == 128).all(-1).sum() == 16
    assert (np.asarray(apply(white, "Cutout", 4, x=0.5, y=0.5)) == 128).all(-1).sum() == 64


@given(
    name=st.sampled_from(OPERATIONS),
    magnitude=st.floats(0, 40),
    size=st.sampled_from([(32, 32), (1, 1), (1, 33), (7, 13), (2, 2), (96, 31)]),
    sign=st.sampled_from([-1, 1]),
    place=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=600, deadline=None)
def test_every_operation_takes_every_magnitude_and_size(
    name: str, magnitude: float, size: tuple[int, int], sign: int, place: tuple[float, float]
) -> None:
    image = build_image(3, width=size[0], height=size[1])
    before = image.tobytes()
    argument = operation_arguments(magnitude, translate_pixels=reach(32, at_224=100), cutout_pixels=reach(32, at_224=40))[name]

    result = apply(image, name, argument * sign if name in module._SIGNED else argument, x=place[0], y=place[1])

    assert (result.mode, result.size) == ("RGB", size)
    assert image.tobytes() == before


@given(st.floats(0, 40), st.integers(0, 8), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_the_same_generator_gives_the_same_image(magnitude: float, operations: int, seed: int) -> None:
    image = build_image(1)

    first = augment(image, seed, magnitude=magnitude, operations=operations)

    assert first.tobytes() == augment(image, seed, magnitude=magnitude, operations=operations).tobytes()


def test_no_operation_is_no_change() -> None:
    image = build_image(1)

    assert augment(image, operations=0).tobytes() == image.tobytes()


def test_operations_are_drawn_uniformly_and_always_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[str] = Counter()
    original = module.apply

    def count(image: Image.Image, name: str, argument: float, *, x: float = 0.5, y: float = 0.5) -> Image.Image:
        drawn[name] += 1
        return original(image, name, argument, x=x, y=y)

    monkeypatch.setattr(module, "apply", count)
    image = build_image(1, width=8, height=8)
    for seed in range(1600):
        augment(image, seed)

    assert sum(drawn.values()) == 3200
    assert set(drawn) == set(OPERATIONS)
    assert all(140 <= count <= 260 for count in drawn.values()), drawn


def test_the_reach_is_the_papers_at_224_and_an_eighth_below_64() -> None:
    assert [reach(size, at_224=100) for size in (8, 32, 63, 64, 144, 224, 600)] == [1, 4, 7, 8, 54, 100, 100]
    assert [reach(size, at_224=40) for size in (32, 64, 144, 224)] == [4, 8, 24, 40]
