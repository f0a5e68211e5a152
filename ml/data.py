"""Batches of labeled and pseudo-labeled images under noise: a function of the seed and the step, whoever computes it.

B labeled images of a step, U pseudo-labeled images of a step, K classes, C H W. Only bytes cross a process border; the
device normalizes. A worker process decodes and augments whole steps; a resumed training, or one with another number of
workers, sees the same bits.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ml.config import ImageConfig, NoiseConfig, RuntimeConfig
from ml.determinism import ReusedGenerator, permutation
from ml.errors import BadImage, DataError
from ml.manifest import Manifest
from ml.pixels import read_image, weak_image
from ml.selection import SelectedLabels
from ml.transforms import strong_view, strong_view_of_small, training_preprocessing

_WORTH_A_WORKER_SECONDS = 6.0
"""A worker takes about three seconds to start; less work than this is done sooner without."""
_SECONDS_A_PIXEL = 2.5e-8
_SECONDS_AN_IMAGE = 8e-5
_PREFETCH = 4
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only asked how full it is


class Batch(NamedTuple):
    """One step's images and targets."""

    images: Tensor
    """uint8 [B + U, C, H, W], labeled first; channels last in memory."""
    labels_B: Tensor
    """int64."""
    soft_UK: Tensor | None
    """float32, each row summing to 1; None without pseudo-labels."""


class _Broken(NamedTuple):
    """A file that cannot be read any more, on its way out of a worker: exceptions do not survive that way."""

    path: str
    status: str
    message: str


class ImageStream:
    """An endless, stateless stream over a list of images: every epoch visits each `repeats` times in a new order.

    Position p belongs to epoch p // N, where N counts the repeats.
    """

    def __init__(self, name: str, seed: int, repeats: npt.NDArray[np.int64]) -> None:
        if len(repeats) == 0 or repeats.min() < 1:
            raise DataError(f"the {name} stream has no images")
        self.name, self.seed = name, seed
        self._ends = np.cumsum(repeats)

    def __len__(self) -> int:
        """Positions of an epoch."""
        return int(self._ends[-1])

    def places(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(image, epoch, number in the epoch) of the positions from `start` up to `stop`; the last two name its noise."""
        places = []
        for position in range(start, stop):
            epoch, at = divmod(position, len(self))
            number = int(permutation(len(self), self.seed, epoch, self.name)[at])
            places.append((int(np.searchsorted(self._ends, number, side="right")), epoch, number))
        return places


class _Images:
    """Strong views of a list of files. Small images stay decoded in memory that workers share, when all of them fit."""

    def __init__(self, paths: list[str], image: ImageConfig, noise: NoiseConfig, *, cached: bool) -> None:
        self._paths, self._config, self._noise = paths, image, noise
        # Filled on first use by whoever needs an image: two who fill one at once write the same bytes.
        self._pixels = torch.empty((len(paths), image.size, image.size, 3), dtype=torch.uint8) if cached else None
        self._filled = torch.zeros(len(paths) if cached else 0, dtype=torch.uint8)

    def share(self) -> None:
        """Move the cache to where worker processes see it."""
        if self._pixels is not None:
            self._pixels.share_memory_()  # type: ignore[no-untyped-call]
            self._filled.share_memory_()  # type: ignore[no-untyped-call]

    def strong(self, index: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
        """HWC; BadImage when the file has vanished or changed."""
        if not self._config.small_images:
            return strong_view(self._read(index), self._config, self._noise, generator)
        if self._pixels is None:
            pixels = np.asarray(weak_image(self._read(index), training_preprocessing(self._config)))
            return strong_view_of_small(pixels, self._config, self._noise, generator)
        cache = self._pixels.numpy()
        if not self._filled.numpy()[index]:
            cache[index] = np.asarray(weak_image(self._read(index), training_preprocessing(self._config)))
            self._filled.numpy()[index] = 1
        return strong_view_of_small(cache[index], self._config, self._noise, generator)

    def _read(self, index: int) -> Image.Image:
        try:
            return read_image(self._paths[index])
        except BadImage as error:
            raise BadImage(f"{self._paths[index]}: {error}", status=error.status, path=self._paths[index]) from error


@dataclass(slots=True)
class _Part:
    """One of the two sources of a batch."""

    stream: ImageStream
    images: _Images
    size: int
    """Images a step."""


class _Steps(Dataset[Batch | _Broken]):
    """Step number -> its batch."""

    def __init__(self, labeled: _Part, labels: npt.NDArray[np.int64], unlabeled: _Part | None, selected: SelectedLabels | None) -> None:
        self.parts = [labeled] if unlabeled is None else [labeled, unlabeled]
        self._labels, self._selected = labels, selected
        self._generators: ReusedGenerator | None = None

    def __getitem__(self, step: int) -> Batch | _Broken:
        try:
            return self._batch(step)
        except BadImage as error:
            return _Broken(error.details["path"], error.status, str(error))

    def _batch(self, step: int) -> Batch:
        views: list[npt.NDArray[np.uint8]] = []
        rows: list[list[int]] = []
        for part in self.parts:
            places = part.stream.places(step * part.size, (step + 1) * part.size)
            views += [part.images.strong(index, self._generator(part.stream, epoch, number)) for index, epoch, number in places]
            rows.append([index for index, _, _ in places])
        soft_UK = None
        if self._selected is not None and len(rows) > 1:
            soft_UK = torch.from_numpy(self._selected.soft(np.array(rows[1], dtype=np.int64)))
        # Channels last in memory is what the views have already, so nothing is copied here.
        return Batch(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), torch.from_numpy(self._labels[rows[0]]), soft_UK)

    def _generator(self, stream: ImageStream, epoch: int, number: int) -> np.random.Generator:
        if self._generators is None:
            # Made where it is used: a worker's copy of it would not survive the way there.
            self._generators = ReusedGenerator()
        return self._generators(stream.seed, "noise", stream.name, epoch, number)


class TrainingBatches:
    """The batches of the steps from `start_step` up to `stop_step`; a context manager that ends its workers.

    `labeled` holds usable rows. With `selected`, each step also has `batch_unlabeled` images of `unlabeled`, an image with
    repeat r standing r times in that stream. Raises DataError for selected keys that the pool does not have, and BadImage
    naming the file when one has vanished or changed since the manifest was made.
    """

    def __init__(
        self,
        *,
        labeled: Manifest,
        class_names: tuple[str, ...],
        selected: SelectedLabels | None,
        unlabeled: Manifest | None,
        image: ImageConfig,
        noise: NoiseConfig,
        batch_labeled: int,
        batch_unlabeled: int,
        seed: int,
        start_step: int,
        stop_step: int,
        runtime: RuntimeConfig,
    ) -> None:
        pool = None
        if selected is not None and unlabeled is not None and batch_unlabeled:
            pool = unlabeled.take(_rows_of(selected, unlabeled))
        num_images = len(labeled) + (0 if pool is None else len(pool))
        cached = image.small_images and num_images * 3 * image.size**2 <= runtime.cache_bytes
        part = _Part(
            ImageStream("labeled", seed, np.ones(len(labeled), dtype=np.int64)),
            _Images(labeled.paths(), image, noise, cached=cached),
            batch_labeled,
        )
        other = None
        if pool is not None and selected is not None:
            stream = ImageStream("unlabeled", seed, selected.repeats)
            other = _Part(stream, _Images(pool.paths(), image, noise, cached=cached), batch_unlabeled)
        labels = np.array(labeled.class_indices(class_names), dtype=np.int64)
        self._steps = _Steps(part, labels, other, selected if other else None)
        self._range = range(start_step, stop_step)
        batch_bytes = (batch_labeled + batch_unlabeled) * 3 * image.size**2
        self._workers = _count_workers(
            runtime,
            num_steps=len(self._range),
            seconds=len(self._range) * (batch_labeled + batch_unlabeled) * (_SECONDS_AN_IMAGE + _SECONDS_A_PIXEL * image.size**2),
            shared_bytes=(num_images * 3 * image.size**2 if cached else 0) + 2 * _PREFETCH * batch_bytes,
        )
        self._pinned = runtime.device == "cuda"
        self._running: Generator[Batch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._running is not None:
            # A traceback may hold the loop that was left; its workers end now all the same.
            self._running.close()

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[Batch]:
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[Batch]:
        for batch in self._from_workers() if self._workers else map(self._steps.__getitem__, self._range):
            if isinstance(batch, _Broken):
                raise BadImage(batch.message, status=batch.status, path=batch.path)
            yield batch

    def _from_workers(self) -> Iterator[Batch | _Broken]:
        for part in self._steps.parts:
            part.images.share()
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=self._range,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH,
            pin_memory=self._pinned,
            # A process forked after torch has run in parallel hangs in its first parallel operation.
            multiprocessing_context="spawn",
            worker_init_fn=_outlive_signals,
            # Else starting workers would draw from torch's global generator, which dropout uses.
            generator=torch.Generator(),
        )
        return iter(loader)


def _count_workers(runtime: RuntimeConfig, *, num_steps: int, seconds: float, shared_bytes: int) -> int:
    """How many workers to start: those asked for, or none when their start would cost more than it saves."""
    asked = 0 if runtime.num_loader_workers == "auto" else runtime.num_loader_workers
    # Containers often have 64 MB of shared memory, and writing beyond it kills the process.
    crowded = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free < 1.25 * shared_bytes * max(1, asked)
    return 0 if crowded or seconds < _WORTH_A_WORKER_SECONDS else min(asked, num_steps)


def _outlive_signals(_worker: int) -> None:
    """The training process answers signals, after a checkpoint; until then it needs its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _rows_of(selected: SelectedLabels, unlabeled: Manifest) -> list[int]:
    """The pool's row of every selected key."""
    rows = pc.index_in(selected.keys(), value_set=unlabeled.table.column("key").combine_chunks())
    if rows.null_count:
        absent = selected.keys().filter(pc.is_null(rows)).to_pylist()
        raise DataError(f"{len(absent)} selected images are not in the pool, for example {absent[0]}", keys=absent[:100])
    return list(pa.array(rows).to_pylist())
