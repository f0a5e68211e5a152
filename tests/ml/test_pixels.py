"""What counts as an image, and which pixels the network sees of it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ml.config import ImageConfig
from ml.errors import BadImage
from ml.locations import MAX_FILE_BYTES
from ml.pixels import Preprocessing, decode, normalize, perceptual_hash, pixel_digest, read_image, weak_view
from tests.ml import builders_images as builders


def build_preprocessing(**fields: object) -> Preprocessing:
    return Preprocessing.from_config(ImageConfig(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_four_formats_decode_to_pillows_rgb(file_format: str) -> None:
    data = builders.image_bytes(1, file_format)

    image = decode(data)

    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("data", [builders.palette_png(), builders.cmyk_jpeg(), builders.encode(builders.build_image(1).convert("1"))])
def test_palette_cmyk_and_bilevel_are_what_pillow_converts_them_to(data: bytes) -> None:
    assert decode(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    data = builders.rotated_jpeg(orientation)

    image = decode(data)

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image.size == expected.size
    assert image.tobytes() == expected.tobytes()


def test_sixteen_bit_gray_is_divided_by_257() -> None:
    pixels = np.asarray(decode(builders.deep_gray_png()))

    assert pixels[:, :, 0].tolist() == [[0, 77, 255], [0, 1, 156]]
    assert (pixels == pixels[:, :, :1]).all()


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))

    assert decode(builders.encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(builders.encode(half)).getpixel((0, 0)) == (127, 127, 127)
    for data in (builders.alpha_png(), builders.transparent_palette_png()):
        rgba = Image.open(io.BytesIO(data)).convert("RGBA")
        over_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        assert decode(data).tobytes() == over_white.tobytes()


@pytest.mark.parametrize("data", [builders.animated_webp(), builders.animated_png()])
def test_the_first_frame_of_an_animation_counts(data: bytes) -> None:
    assert decode(data).tobytes() == builders.build_image(5).tobytes()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "unsupported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        (b"%PDF-1.7", "unsupported"),
        (builders.gif(), "unsupported"),
        (builders.encode(builders.build_image(1), "TIFF"), "unsupported"),
        (builders.truncated_jpeg(), "undecodable"),
        (builders.image_bytes(1)[:100], "undecodable"),
        (b"\x89PNG\r\n\x1a\nnot really", "undecodable"),
        (builders.huge_header_png(), "too_large"),
        (builders.huge_header_png(60_000, 60_000), "too_large"),
    ],
)
def test_everything_else_has_a_status(data: bytes, status: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)

    assert caught.value.status == status


def test_absent_folders_and_giants_have_a_status(tmp_path: Path) -> None:
    with (tmp_path / "giant.jpg").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)

    for path, status in ((tmp_path / "absent", "missing"), (tmp_path, "missing"), (tmp_path / "giant.jpg", "too_large")):
        with pytest.raises(BadImage) as caught:
            read_image(path)
        assert caught.value.status == status


SEEDS = [builders.image_bytes(1, name) for name in ("JPEG", "PNG", "WEBP", "BMP")] + [builders.palette_png(), builders.rotated_jpeg()]


@given(data=st.sampled_from(SEEDS), changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_give_an_image_or_a_bad_image(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value

    try:
        outcome = decode(bytes(damaged), max_pixels=1_000_000).mode
    except BadImage as error:
        outcome = error.status

    assert outcome in ("RGB", "undecodable", "unsupported", "too_large")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (31, 97), (500, 375), (33, 64)])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0, 0.5])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_weak_view_is_resize_and_center_crop(size: tuple[int, int], crop_ratio: float, interpolation: str) -> None:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    image = builders.build_image(3, width=size[0], height=size[1])

    view = weak_view(image, build_preprocessing(size=64, crop_ratio=crop_ratio, interpolation=interpolation))

    reference = transforms.Compose([transforms.Resize(int(64 / crop_ratio), InterpolationMode(interpolation)), transforms.CenterCrop(64)])
    assert view.dtype == np.uint8
    assert np.abs(view.astype(int) - np.asarray(reference(image)).astype(int)).max() == 0


def test_a_small_image_of_the_right_size_keeps_its_pixels() -> None:
    image = builders.build_image(1)

    assert (weak_view(image, build_preprocessing(size=32, small_images=True)) == np.asarray(image)).all()


def test_a_one_pixel_high_strip_costs_no_memory() -> None:
    strip = Image.new("RGB", (4_000_000, 1), "red")

    view = weak_view(strip, build_preprocessing(size=224))

    assert view.shape == (224, 224, 3)


def test_normalize_is_the_formula() -> None:
    preprocessing = build_preprocessing(size=8)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)

    normalized = normalize(images, preprocessing)

    expected = ((images / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)).transpose(0, 3, 1, 2)
    assert normalized.dtype == np.float32
    assert normalized.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(normalized, expected, atol=1e-6)


def test_preprocessing_survives_json_and_its_digest_sees_every_field() -> None:
    preprocessing = build_preprocessing(size=32, evaluation_size=40)

    assert preprocessing.size == 40
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    assert preprocessing.digest() != build_preprocessing(size=32).digest()
    with pytest.raises(ValueError, match="rule 1"):
        Preprocessing.from_dict(preprocessing.to_dict() | {"rule": 2})


def test_the_pixel_digest_ignores_the_file_and_sees_the_shape() -> None:
    image = builders.build_image(1)

    assert pixel_digest(decode(builders.encode(image, "PNG"))) == pixel_digest(decode(builders.encode(image, "BMP")))
    assert pixel_digest(Image.new("RGB", (4, 2))) != pixel_digest(Image.new("RGB", (2, 4)))


def test_the_perceptual_hash_survives_jpeg_and_resizing() -> None:
    image = builders.build_image(1, width=200, height=150)

    original = perceptual_hash(image)
    again = perceptual_hash(decode(builders.encode(image.resize((180, 135)), "JPEG", quality=80)))
    other = perceptual_hash(builders.build_image(2, width=200, height=150))

    assert original is not None
    assert again is not None
    assert other is not None
    assert (original ^ again).bit_count() <= 4
    assert (original ^ other).bit_count() >= 10


def test_plain_pictures_have_no_perceptual_hash() -> None:
    assert perceptual_hash(Image.new("RGB", (50, 50), "blue")) is None
    assert perceptual_hash(Image.linear_gradient("L").rotate(90).convert("RGB")) is None


def test_pixels_reaches_no_torch() -> None:
    code = "import ml.pixels, ml.manifest, sys; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'pyarrow')))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
