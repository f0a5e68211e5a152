"""Elastic, pixelated, compressed. N images, H W rows and columns, C = 3 channels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.robustness.draws import Draws
from ml.robustness.filters import mirror, mirror_between, smooth_fields
from ml.robustness.levels import Bytes, Floats, to_bytes, to_levels
from ml.robustness.severities import Constants

Border = Callable[[NDArray[np.intp], int], NDArray[np.intp]]
_TRUNCATE = 3.0


def pixelate(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Scaled down by the constant and up again, both times with Pillow's box filter."""
    [ratio] = constants
    height, width = images_NHWC.shape[1:3]
    coarse = (int(width * ratio), int(height * ratio))
    out_NHWC = np.empty_like(images_NHWC)
    for image_HWC, out_HWC in zip(images_NHWC, out_NHWC, strict=True):
        small = Image.fromarray(image_HWC).resize(coarse, Image.Resampling.BOX)
        out_HWC[...] = small.resize((width, height), Image.Resampling.BOX)
    return out_NHWC


def jpeg_compression(images_NHWC: Bytes, constants: Constants, _: Draws) -> Bytes:
    """Through a JPEG file of Pillow's of this quality, with its halved color resolution."""
    [quality] = constants
    out_NHWC = np.empty_like(images_NHWC)
    for image_HWC, out_HWC in zip(images_NHWC, out_NHWC, strict=True):
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "JPEG", quality=int(quality))
        with Image.open(file, formats=["JPEG"]) as image:
            out_HWC[...] = image
    return out_NHWC


def elastic_transform(images_NHWC: Bytes, constants: Constants, draws: Draws) -> Bytes:
    """A random affine map, then every pixel moved by a smooth random field.

    Constants as shares of the shorter side: how far the field moves pixels at most before it is smoothed, the deviation with
    which it is smoothed, how far each of three points of the affine map moves at most.
    """
    num_images, height, width, _ = images_NHWC.shape
    side = min(height, width)
    displacement, sigma, shift = (constant * side for constant in constants)
    rows_NHW, columns_NHW = _affine_places(draws.uniforms("affine", 3, 2), height, width, shift)
    levels_NHWC = sample(to_levels(images_NHWC), rows_NHW, columns_NHW, mirror)
    if displacement:
        fields_N2HW = draws.uniforms("field", 2, height, width).astype(np.float64) * 2 - 1
        # In float64, because the smoothing leaves a small part of what went in.
        fields_N2HW = smooth_fields(fields_N2HW, sigma, truncate=_TRUNCATE) * displacement
        rows_NHW = (np.arange(height)[:, None] + fields_N2HW[:, 0]).astype(np.float32)
        columns_NHW = (np.arange(width) + fields_N2HW[:, 1]).astype(np.float32)
        levels_NHWC = sample(levels_NHWC, rows_NHW, columns_NHW, mirror_between)
    return to_bytes(levels_NHWC.reshape(num_images, height, width, -1))


def _affine_places(chance_N32: Floats, height: int, width: int, shift: float) -> tuple[Floats, Floats]:
    """Where each pixel comes from when three points around the center move by up to `shift` pixels: rows and columns [N, H, W]."""
    third = min(height, width) // 3
    across, down = width // 2, height // 2
    points_32 = np.array([[across + third, down + third], [across + third, down - third], [across - third, down - third]], np.float64)
    moved_N32 = points_32 + (chance_N32.astype(np.float64) * 2 - 1) * shift
    moved_N33 = np.concatenate([moved_N32, np.ones((len(moved_N32), 3, 1))], axis=-1)
    # [x, y, 1] of a pixel of the result times this is x, y of the pixel that it shows.
    back_N32 = np.linalg.solve(moved_N33, np.broadcast_to(points_32, moved_N32.shape))
    x_W, y_H1 = np.arange(width), np.arange(height)[:, None]
    columns_NHW, rows_NHW = (
        back_N32[:, 0, axis, None, None] * x_W + back_N32[:, 1, axis, None, None] * y_H1 + back_N32[:, 2, axis, None, None]
        for axis in (0, 1)
    )
    return rows_NHW.astype(np.float32), columns_NHW.astype(np.float32)


def sample(levels_NHWC: Floats, rows_NHW: Floats, columns_NHW: Floats, border: Border) -> Floats:
    """The images at these places, bilinear; `border` says which pixel stands for one that lies outside."""
    num_images, height, width, channels = levels_NHWC.shape
    top_NHW, left_NHW = np.floor(rows_NHW), np.floor(columns_NHW)
    down_NHW1, right_NHW1 = (rows_NHW - top_NHW)[..., None], (columns_NHW - left_NHW)[..., None]
    tops, lefts = top_NHW.astype(np.intp), left_NHW.astype(np.intp)
    starts_N11 = (np.arange(num_images) * height * width)[:, None, None]
    rows = [border(tops + step, height) * width + starts_N11 for step in (0, 1)]
    columns = [border(lefts + step, width) for step in (0, 1)]
    flat = levels_NHWC.reshape(-1, channels)
    upper, lower = (_between(flat.take(row + columns[0], axis=0), flat.take(row + columns[1], axis=0), right_NHW1) for row in rows)
    return _between(upper, lower, down_NHW1)


def _between(one: Floats, other: Floats, share: Floats) -> Floats:
    other -= one
    other *= share
    other += one
    return other
