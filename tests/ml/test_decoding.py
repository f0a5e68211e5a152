"""Small images are decoded in processes of their own, with the same pixels and the same account of broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ml.decoding import WORTH_ROWS, Decoders, _Decoder, shared_decoders, weak_views
from ml.locations import Location
from ml.pixels import Preprocessing

SMALL = Preprocessing(size=16, crop_ratio=1.0, small_images=True, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def write_images(folder: Path, count: int) -> list[Location]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((20, 24, 3), 10 * number, np.uint8)).save(path)
    return [Location(str(path)) for path in paths]


def test_a_decoding_process_gives_the_same_pixels_and_statuses_as_this_one(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    paths = [*write_images(tmp_path, 3), Location(str(broken)), Location(str(tmp_path / "gone.png"))]
    decoders = Decoders(2)

    theirs = decoders.weak_views(paths, SMALL)
    nothing = decoders.weak_views([], SMALL)
    decoders.close()

    ours = weak_views(paths, SMALL)
    assert theirs.statuses == ours.statuses == ["ok", "ok", "ok", "undecodable", "missing"]
    assert np.array_equal(theirs.images, ours.images)
    assert nothing.images.shape == (0, 16, 16, 3)


def test_files_are_decoded_here_when_the_decoding_process_was_killed(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 2)
    decoders = Decoders(1)
    decoder = _Decoder()
    decoders._idle.get()
    decoders._idle.put(decoder)
    decoder._process.kill()
    decoder._process.wait()

    views = decoders.weak_views(paths, SMALL)
    decoders.close()

    assert views.statuses == ["ok", "ok"]


def test_a_decoding_process_ends_when_its_input_does() -> None:
    decoder = _Decoder()
    assert decoder._process.stdin is not None
    decoder._process.stdin.close()

    code = decoder._process.wait(timeout=30)
    decoder.end()

    assert code == 0


def test_few_images_and_photographs_start_no_process() -> None:
    photographs = Preprocessing(size=16, crop_ratio=1.0, small_images=False, interpolation="bicubic", mean=SMALL.mean, std=SMALL.std)

    assert shared_decoders(photographs, num_rows=10 * WORTH_ROWS, count=2) is None
    assert shared_decoders(SMALL, num_rows=1, count=2) is None
    assert shared_decoders(SMALL, num_rows=WORTH_ROWS, count=1) is None
