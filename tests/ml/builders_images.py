"""Tiny image files of every kind, the same on every call. No torch."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def build_pixels(number: int = 0, *, width: int = 32, height: int = 32, hue: int = 0) -> npt.NDArray[np.uint8]:
    """A noisy HWC picture; another `number` is another picture, `hue` (0..5) tints it so that classes can be learned."""
    generator = np.random.default_rng(1000 + number)
    coarse = generator.integers(0, 120, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    pixels = coarse[rows][:, columns] + generator.integers(0, 16, (height, width, 3), dtype=np.uint8)
    tint = np.array([[120, 0, 0], [0, 120, 0], [0, 0, 120], [120, 120, 0], [0, 120, 120], [120, 0, 120]], dtype=np.uint8)
    return np.asarray(pixels + tint[hue % 6], dtype=np.uint8)


def build_image(number: int = 0, **options: int) -> Image.Image:
    """`build_pixels` as an RGB Pillow image."""
    return Image.fromarray(build_pixels(number, **options))


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The image file's bytes; `options` are Pillow's for saving."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def image_bytes(number: int = 0, file_format: str = "PNG", **options: int) -> bytes:
    """A picture's file."""
    return encode(build_image(number, **options), file_format)


def write_image(path: Path, number: int = 0, **options: int) -> Path:
    """Put a picture at `path`, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build_image(number, **options).save(path)
    return path


def write_class_folders(root: Path, counts: Mapping[str, int], *, first: int = 0, size: int = 32, suffix: str = ".png") -> Path:
    """`root/<class>/<number>.png`, all pictures different; the hue follows the place of the class in `counts`."""
    number = first
    for hue, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            write_image(root / name / f"{number:05d}{suffix}", number, width=size, height=size, hue=hue)
            number += 1
    return root


def write_flat_folder(root: Path, count: int, *, first: int = 10_000, size: int = 32, num_hues: int = 2) -> Path:
    """`root/<number>.png`, pictures of `num_hues` hues in turn: a pool."""
    for number in range(first, first + count):
        write_image(root / f"{number:05d}.png", number, width=size, height=size, hue=number % num_hues)
    return root


def palette_png() -> bytes:
    """A PNG with 16 colors in a palette."""
    return encode(build_image(1).quantize(16))


def transparent_palette_png() -> bytes:
    """A palette PNG whose first color is transparent."""
    return encode(build_image(1).quantize(16), transparency=0)


def alpha_png() -> bytes:
    """A PNG whose transparency grows from left to right."""
    image = build_image(2)
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return encode(image)


def cmyk_jpeg() -> bytes:
    """A JPEG in CMYK."""
    return encode(build_image(3).convert("CMYK"), "JPEG", quality=95)


def rotated_jpeg(orientation: int = 6) -> bytes:
    """A 32 x 24 JPEG that EXIF asks to rotate."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(build_image(4, height=24), "JPEG", quality=95, exif=exif)


def deep_gray_png() -> bytes:
    """A 16-bit gray PNG holding 0, 257 * 77, 65535 and values in between."""
    levels = np.array([[0, 257 * 77, 65535], [128, 129, 40000]], dtype=np.uint16)
    return encode(Image.fromarray(levels))


def animated_webp() -> bytes:
    """A WebP of three frames."""
    frames = [build_image(number) for number in (5, 6, 7)]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def animated_png() -> bytes:
    """A PNG of three frames."""
    frames = [build_image(number) for number in (5, 6, 7)]
    return encode(frames[0], "PNG", save_all=True, append_images=frames[1:])


def gif() -> bytes:
    """A GIF, which is no supported image."""
    return encode(build_image(8), "GIF")


def truncated_jpeg() -> bytes:
    """The first half of a JPEG."""
    data = image_bytes(9, "JPEG", width=64, height=64)
    return data[: len(data) // 2]


def huge_header_png(width: int = 10_000, height: int = 10_000) -> bytes:
    """A PNG that promises 100 megapixels and holds none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
