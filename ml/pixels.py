"""From bytes to the pixels that a network sees: one rule for training, labeling, evaluation and serving.

Pillow and numpy only, so that the API can import it. Pillow's decoders and its resize are the reference: another resize that
differs by one level on a few pixels moves probabilities by more than 1e-4.

Axes: N images, H W rows and columns, C = 3 channels, RGB.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import warnings
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

# Importing the four plugins registers them; Pillow would else import all forty on its first WebP.
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

from ml.errors import BadImage
from ml.locations import Location, read_bytes

if TYPE_CHECKING:
    from ml.config import ImageConfig

STATUSES = ("ok", "undecodable", "too_large", "unsupported", "empty", "missing", "changed")
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
    )
)
MAX_PIXELS = 50_000_000
RULE = 1
"""Counts changes of what `decode` and `weak_view` make of a file; part of every preprocessing digest."""

SHRUNK_QUALITY = 95
_LOSSLESS = (b"\x89PNG", b"BM")

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_LONGEST = 16
"""Images that would be longer than this many sides of the square are cut before they are resized."""
_ORIENTATION = 0x0112
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow 13 raises on bytes made to hurt it; found by fuzzing, EOFError and SyntaxError are real.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)
# Our own cap, checked before decoding, is lower than the size at which Pillow begins to warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in `data`; BadImage, with a status, for everything that is none.

    JPEG, PNG, WebP and BMP by content. Rotated as EXIF says; palettes and CMYK as Pillow converts them; 16-bit gray divided
    by 257 and rounded (of 16-bit color Pillow itself keeps the high byte); transparency over white; the first frame.
    """
    if not data:
        raise BadImage("the file is empty", status="empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(f"{width} x {height}", max_pixels)
            image.load()
            rgb = _to_rgb(image)
            rotation = _ROTATIONS.get(_orientation(image))
    except UnidentifiedImageError as error:
        if _looks_supported(data):
            raise BadImage("the file begins like an image but cannot be read as one", status="undecodable") from error
        raise BadImage("not a JPEG, PNG, WebP or BMP image", status="unsupported") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("more", max_pixels) from error
    except _DECODER_ERRORS as error:
        raise BadImage(f"the image is truncated or damaged: {error}", status="undecodable") from error
    return rgb if rotation is None else rgb.transpose(rotation)


def shrink(data: bytes, image: Image.Image, shorter_side: int) -> bytes | None:
    """A file of the same picture that is only so large; None when it is no larger. `image` is what `decode` makes of `data`.

    What was kept without loss stays so (PNG), the rest becomes JPEG of quality SHRUNK_QUALITY with full color resolution.
    """
    ratio = shorter_side / min(image.size)
    if ratio >= 1:
        return None
    smaller = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if data.startswith(_LOSSLESS):
        smaller.save(file, "PNG")
    else:
        smaller.save(file, "JPEG", quality=SHRUNK_QUALITY, subsampling=0)
    return file.getvalue()


def read_image(place: Location | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image at `place`; BadImage when it is absent, unreadable, no image, or not what it was."""
    return decode(read_bytes(place), max_pixels=max_pixels)


def _too_large(size: str, max_pixels: int) -> BadImage:
    return BadImage(f"the image has {size} pixels, at most {max_pixels} in all are allowed", status="too_large", max_pixels=max_pixels)


def _looks_supported(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (*_DECODER_ERRORS, Warning):
        # A photograph with broken EXIF is still a photograph.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    # copy() detaches the pixels from the file object that is closed after this.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    deep_HW = np.asarray(image).astype(np.int64)
    gray_HW = ((deep_HW.clip(0, 65535) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray_HW[deep_HW == transparent] = 255
    return Image.fromarray(gray_HW).convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Everything between a decoded image and the network's input."""

    size: int
    """Side of the square in pixels."""
    crop_ratio: float
    """The shorter side becomes floor(size / crop_ratio), then the center is cut; not used for small images."""
    small_images: bool
    """Resize straight to the square, whatever the shape."""
    interpolation: str
    """Pillow's filter: bilinear or bicubic."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: ImageConfig, *, size: int | None = None) -> Preprocessing:
        """The evaluation preprocessing of `config`; at `size` instead when one is given."""
        return cls(
            size=size or config.evaluation_size or config.size,
            crop_ratio=config.crop_ratio,
            small_images=config.small_images,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the number of the decoding rule."""
        return {"rule": RULE, **asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; ValueError for fields of another version."""
        known = {field.name for field in fields(cls)}
        if data.get("rule") != RULE or set(data) != known | {"rule"}:
            raise ValueError(f"preprocessing must have rule {RULE} and the fields {', '.join(sorted(known))}, got {data}")
        values = {name: data[name] for name in known}
        return cls(**(values | {"mean": tuple(data["mean"]), "std": tuple(data["std"])}))

    def digest(self) -> str:
        """SHA-256, hex: equal digests, equal pixels."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def scale_and_bias(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Per channel, `level * scale + bias` is the normalized value of a level 0..255."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def weak_view(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The uint8 HWC square that teachers, evaluation and serving see of an RGB image.

    The same pixels, to the bit, as torchvision's Resize(floor(size / crop_ratio)) and CenterCrop(size) on a Pillow image.
    """
    return np.array(weak_image(image, preprocessing))


def weak_image(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """`weak_view` as a Pillow image."""
    size, interpolation = preprocessing.size, INTERPOLATIONS[preprocessing.interpolation]
    if preprocessing.small_images:
        return image if image.size == (size, size) else image.resize((size, size), interpolation)
    shorter = math.floor(size / preprocessing.crop_ratio)
    width, height = image.size
    scaled_width = shorter if width <= height else int(shorter * width / height)
    scaled_height = shorter if height <= width else int(shorter * height / width)
    left, top = round((scaled_width - size) / 2), round((scaled_height - size) / 2)
    if max(scaled_width, scaled_height) <= _LONGEST * size:
        return image.resize((scaled_width, scaled_height), interpolation).crop((left, top, left + size, top + size))
    # A strip would become an endless one; only its center is resized. Pillow takes the box in float32, which may move a
    # level by one, so ordinary shapes go the way above.
    box = (left * width / scaled_width, top * height / scaled_height)
    corner = (min(width, (left + size) * width / scaled_width), min(height, (top + size) * height / scaled_height))
    return image.resize((size, size), interpolation, box=(*box, *corner))


def normalize(images_NHWC: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """float32 NCHW, (level / 255 - mean) / std: what an exported network takes."""
    scale, bias = preprocessing.scale_and_bias()
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)).astype(np.float32)
    images_NCHW *= scale[:, None, None]
    images_NCHW += bias[:, None, None]
    return images_NCHW


def pixel_digest(image: Image.Image) -> str:
    """SHA-256, hex, of an RGB image's size and pixels: equal for equal pictures in different files."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def perceptual_hash(image: Image.Image) -> int | None:
    """64-bit difference hash: bit set where a gray 9 x 8 thumbnail grows darker to the right, row by row from the highest bit.

    None for pictures with next to no structure (plain colors, even gradients): those would all be duplicates of one another.
    """
    thumbnail = image.resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=3.0).convert("L")
    gray = np.asarray(thumbnail).astype(np.int16)
    value = int.from_bytes(np.packbits(gray[:, :-1] > gray[:, 1:]).tobytes(), "big")
    return value if 4 <= value.bit_count() <= 60 else None
