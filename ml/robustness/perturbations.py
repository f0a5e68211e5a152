"""The perturbation sequences of ImageNet-P and CIFAR-10-P: short films of an image that changes a little from frame to frame.

Written from the constants of hendrycks/robustness, ImageNet-P/create_p/make_imagenet_p.py (224 px) and make_cifar_p.py (32 px),
at difficulty 1. What differs from the public files: the frames stay as they are made, where ImageNet-P's went through H.264.

N images, T frames, H W rows and columns, C = 3 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.errors import DataError
from ml.files import written_aside
from ml.robustness import color, filters, spatter, weather
from ml.robustness.corruptions import check_images, check_kernel
from ml.robustness.draws import Draws
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels, to_nearest_bytes
from ml.robustness.severities import SMALL_SIDE

_AFFINE, _PERSPECTIVE = Image.Transform.AFFINE, Image.Transform.PERSPECTIVE
_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
_KEPT_UNDER_SNOW = 0.85
_ZOOM_STEP = 0.004
_BORDER = 2
_WRITTEN_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What the public code takes for images of a size. Angles in degrees, distances in pixels, shares of 1."""

    num_frames: dict[str, int]
    """Where it is not 31."""
    noise_deviation: float
    photons: float
    motion: tuple[int, float, float]
    """Radius, deviation, degrees a frame: the last frame moves to the right."""
    snow_zoom: float
    snow_motion: tuple[int, float]
    brightness_step: float
    first_shift: int
    tilt_step: float
    scale: tuple[float, float]
    """The first frame's scale, and the change a frame."""
    liquid: tuple[float, float, float, float]
    """Spatter's mean, deviation, blur and threshold."""
    drip: dict[int, float]
    """Rows above → how much of their liquid flows down a frame."""


LARGE = Constants(
    num_frames={"translate": 41},
    noise_deviation=0.03,
    photons=300,
    motion=(10, 3.0, 4.0),
    snow_zoom=3,
    snow_motion=(14, 4.0),
    brightness_step=0.02,
    first_shift=-20,
    tilt_step=1.0,
    scale=(0.4, 0.025),
    liquid=(0.65, 0.27, 3.7, 0.69),
    drip={-1: 0.05, 0: 0.1, 1: 0.15, 2: 0.7},
)
SMALL = Constants(
    num_frames={"translate": 16, "motion_blur": 21},
    noise_deviation=0.02,
    photons=700,
    motion=(6, 1.8, 9.0),
    snow_zoom=2,
    snow_motion=(10, 2.0),
    brightness_step=0.015,
    first_shift=-7,
    tilt_step=0.75,
    scale=(0.7, 0.02),
    liquid=(0.6, 0.265, 1.75, 0.7),
    drip={0: 0.2, 1: 0.8},
)
_NUM_FRAMES = 31


def constants_for(side: int) -> Constants:
    """CIFAR's where the shorter side of a frame is at most 64 pixels, else ImageNet's."""
    return SMALL if side <= SMALL_SIDE else LARGE


def num_frames(perturbation: str, *, side: int) -> int:
    """Frames of a sequence."""
    _check_name(perturbation)
    return constants_for(side).num_frames.get(perturbation, _NUM_FRAMES)


def perturb(images_NHWC: Bytes, perturbation: str, *, seed: int, indices: Sequence[int], size: int | None = None) -> Bytes:
    """Frames [N, T, size, size, C], or [N, T, H, W, C] without a size, of uint8 RGB images.

    `indices` are the images' places in their data set and decide every draw, as in `ml.robustness.corruptions.corrupt`. With a
    size the center is cut out *after* an image was moved, so that what comes in at the border is the picture (ImageNet-P: 224 out
    of images with a shorter side of 256); without one it is black (CIFAR-10-P). DataError as in `corrupt`.
    """
    _check_name(perturbation)
    check_images(images_NHWC, indices)
    height, width = images_NHWC.shape[1:3]
    if size is not None and size > min(height, width):
        raise DataError(f"frames of {size} x {size} pixels cannot be cut out of images of {height} x {width}")
    frame = (height, width) if size is None else (size, size)
    constants = constants_for(min(frame))
    check_kernel(perturbation, _kernel_side(perturbation, constants), height=frame[0], width=frame[1])
    frames_NTHWC = np.empty((len(images_NHWC), num_frames(perturbation, side=min(frame)), *frame, 3), np.uint8)
    make = _FUNCTIONS[perturbation]
    for row, index in enumerate(indices):
        draws = Draws([index], seed, "perturbation", perturbation)
        for at, frame_HWC in enumerate(make(images_NHWC[row], frame, constants, draws)):
            frames_NTHWC[row, at] = frame_HWC
    return frames_NTHWC


def write_sequences(
    path: Path, images_NHWC: Bytes, perturbation: str, *, seed: int, indices: Sequence[int], size: int | None = None
) -> NDArray[np.uint8]:
    """The same as `perturb`, made piece by piece into a .npy file, which is there whole or not at all; returns it as a memory map.

    The file is CIFAR-10-P's layout. Images may be a memory map themselves: only a few are in memory at a time.
    """
    start = perturb(images_NHWC[:1], perturbation, seed=seed, indices=indices[:1], size=size)
    with written_aside(path) as aside:
        frames = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=(len(images_NHWC), *start.shape[1:]))
        for first in range(0, len(images_NHWC), _WRITTEN_AT_ONCE):
            part = slice(first, first + _WRITTEN_AT_ONCE)
            frames[part] = perturb(np.asarray(images_NHWC[part]), perturbation, seed=seed, indices=indices[part], size=size)
        frames.flush()
        del frames
    opened: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return opened


def _check_name(perturbation: str) -> None:
    if perturbation not in _FUNCTIONS:
        raise DataError(f"there is no perturbation {perturbation!r}; known: {', '.join(_FUNCTIONS)}", perturbation=perturbation)


def _kernel_side(perturbation: str, constants: Constants) -> int:
    return {
        "motion_blur": 2 * constants.motion[0] + 1,
        "snow": 2 * constants.snow_motion[0] + 1,
        "spatter": 2 * filters.gaussian_radius(constants.liquid[2]) + 1,
    }.get(perturbation, 1)


Frame = tuple[int, int]
"""Rows and columns."""


def _center(image_HWC: Bytes, frame: Frame) -> Bytes:
    """The middle of the image, placed as torchvision's CenterCrop places it."""
    top, left = (round((have - want) / 2) for have, want in zip(image_HWC.shape[:2], frame, strict=True))
    return image_HWC[top : top + frame[0], left : left + frame[1]]


def _gaussian_noise(image_HWC: Bytes, frame: Frame, constants: Constants, draws: Draws) -> Iterator[Bytes]:
    clean_HWC = _center(image_HWC, frame)
    yield clean_HWC
    for at in range(1, _NUM_FRAMES):
        [noise_HWC] = draws.normals(f"frame {at}", *clean_HWC.shape)
        yield to_bytes(noise_HWC * np.float32(constants.noise_deviation * 255) + clean_HWC)


def _shot_noise(image_HWC: Bytes, frame: Frame, constants: Constants, draws: Draws) -> Iterator[Bytes]:
    clean_HWC = _center(image_HWC, frame)
    yield clean_HWC
    means_NHWC = to_levels(clean_HWC)[None] * np.float32(constants.photons / 255)
    for at in range(1, _NUM_FRAMES):
        [counts_HWC] = draws.poisson(f"frame {at}", means_NHWC)
        yield to_bytes(counts_HWC * np.float32(255 / constants.photons))


def _motion_blur(image_HWC: Bytes, frame: Frame, constants: Constants, _: Draws) -> Iterator[Bytes]:
    levels_NHWC = to_levels(_center(image_HWC, frame))[None]
    radius, sigma, degrees = constants.motion
    last = constants.num_frames.get("motion_blur", _NUM_FRAMES)
    # CIFAR's 21 frames end at 0 degrees and so do ImageNet's 31: the public code counts back from 20 and from 30.
    for at in range(last):
        yield to_nearest_bytes(filters.motion_blur(levels_NHWC, radius, sigma, [(at - last + 1) * degrees]))[0]


def _zoom_blur(image_HWC: Bytes, frame: Frame, _: Constants, __: Draws) -> Iterator[Bytes]:
    total_HWC = to_levels(_center(image_HWC, frame))
    yield _center(image_HWC, frame)
    for at in range(1, _NUM_FRAMES):
        total_HWC += _center(_scaled(image_HWC, 1 + _ZOOM_STEP * at), frame)
        yield to_bytes(total_HWC / np.float32(at + 1))


def _snow(image_HWC: Bytes, frame: Frame, constants: Constants, draws: Draws) -> Iterator[Bytes]:
    levels_NHWC = to_levels(_center(image_HWC, frame))[None]
    flakes_NHW1 = weather.snowflakes(draws.normals("flakes", *frame), 0.05, 0.3, constants.snow_zoom, 0.5)
    radius, sigma = constants.snow_motion
    for at in range(_NUM_FRAMES):
        fallen_NHW1 = weather.moving_snow(flakes_NHW1, radius, sigma, np.array([at * 4.0 - 150]))
        yield weather.under_snow(levels_NHWC.copy(), fallen_NHW1, _KEPT_UNDER_SNOW)[0]


def _spatter(image_HWC: Bytes, frame: Frame, constants: Constants, draws: Draws) -> Iterator[Bytes]:
    images_NHWC = _center(image_HWC, frame)[None]
    liquid_NHW = spatter.liquid(draws.normals("liquid", *frame), *constants.liquid)
    for _ in range(_NUM_FRAMES):
        yield spatter.under_water(images_NHWC, liquid_NHW, 0.6)[0]
        liquid_NHW = _dripped(liquid_NHW, constants.drip)


def _dripped(liquid_NHW: Floats, drip: dict[int, float]) -> Floats:
    """Liquid that flows down the image, a frame later; none comes in from above."""
    rows = liquid_NHW.shape[1]
    flown_NHW = np.zeros_like(liquid_NHW)
    for above, share in drip.items():
        source = slice(max(0, -above), rows - max(0, above))
        target = slice(max(0, above), rows - max(0, -above))
        flown_NHW[:, target] += liquid_NHW[:, source] * np.float32(share)
    return flown_NHW


def _brightness(image_HWC: Bytes, frame: Frame, constants: Constants, _: Draws) -> Iterator[Bytes]:
    levels_HWC = to_levels(_center(image_HWC, frame))
    for at in range(_NUM_FRAMES):
        yield to_bytes(color.brighten(levels_HWC, np.float32((at - 15) * constants.brightness_step * 255)))


def _translate(image_HWC: Bytes, frame: Frame, constants: Constants, _: Draws) -> Iterator[Bytes]:
    image = Image.fromarray(image_HWC)
    for at in range(constants.num_frames["translate"]):
        right = constants.first_shift + at
        yield _center(np.asarray(image.transform(image.size, _AFFINE, (1, 0, -right, 0, 1, 0), _NEAREST)), frame)


def _rotate(image_HWC: Bytes, frame: Frame, _: Constants, __: Draws) -> Iterator[Bytes]:
    for at in range(_NUM_FRAMES):
        turn = math.radians(at - 15)
        yield _center(_around_center(image_HWC, math.cos(turn), math.sin(turn)), frame)


def _scale(image_HWC: Bytes, frame: Frame, constants: Constants, _: Draws) -> Iterator[Bytes]:
    first, step = constants.scale
    for at in range(_NUM_FRAMES):
        yield _center(_scaled(image_HWC, first + step * at), frame)


def _scaled(image_HWC: Bytes, factor: float) -> Bytes:
    return _around_center(image_HWC, 1 / factor, 0.0)


def _around_center(image_HWC: Bytes, cosine: float, sine: float) -> Bytes:
    """The image seen through the inverse map (cosine, sine; -sine, cosine) around its center, bilinear, black outside."""
    image = Image.fromarray(image_HWC)
    across, down = image.width / 2, image.height / 2
    inverse = (cosine, sine, across - cosine * across - sine * down, -sine, cosine, down + sine * across - cosine * down)
    return np.asarray(image.transform(image.size, _AFFINE, inverse, _BILINEAR))


def _tilt(image_HWC: Bytes, frame: Frame, constants: Constants, _: Draws) -> Iterator[Bytes]:
    height, width = image_HWC.shape[:2]
    # With a black border around it, the picture's own border fades into black, as OpenCV has it.
    image = Image.fromarray(np.pad(image_HWC, ((_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0))))
    for at in range(_NUM_FRAMES):
        a, b, c, d, e, f, g, h = tilt_inverse(width, height, (at - 15) * constants.tilt_step)
        moved = (a + _BORDER * g, b + _BORDER * h, c + _BORDER, d + _BORDER * g, e + _BORDER * h, f + _BORDER, g, h)
        yield _center(np.asarray(image.transform((width, height), _PERSPECTIVE, moved, _BILINEAR)), frame)


def tilt_inverse(width: int, height: int, degrees: float) -> tuple[float, ...]:
    """Pillow's eight numbers for a picture turned in space by so many degrees around both axes, seen from its diagonal's distance."""
    turn, distance = math.radians(degrees), math.hypot(width, height)
    cosine, sine = math.cos(turn), math.sin(turn)
    # Pixels have their centers at whole numbers in the public code (OpenCV) and at halves in Pillow.
    into = np.array([[1, 0, -width / 2 - 0.5], [0, 1, -height / 2 - 0.5], [0, 0, 1], [0, 0, 1]])
    about_x = np.array([[1, 0, 0, 0], [0, cosine, -sine, 0], [0, sine, cosine, 0], [0, 0, 0, 1]])
    about_y = np.array([[cosine, 0, -sine, 0], [0, 1, 0, 0], [sine, 0, cosine, 0], [0, 0, 0, 1]])
    away = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, distance], [0, 0, 0, 1]])
    seen = np.array([[distance, 0, width / 2 + 0.5, 0], [0, distance, height / 2 + 0.5, 0], [0, 0, 1, 0]])
    inverse = np.linalg.inv(seen @ away @ about_x @ about_y @ into)
    return tuple((inverse / inverse[2, 2]).ravel()[:8].tolist())


_FUNCTIONS: dict[str, Callable[[Bytes, Frame, Constants, Draws], Iterator[Bytes]]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "spatter": _spatter,
    "brightness": _brightness,
    "translate": _translate,
    "rotate": _rotate,
    "tilt": _tilt,
    "scale": _scale,
}
