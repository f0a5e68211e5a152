"""Batches of labeled and pseudo-labeled images under noise, as tensors, from this process or from workers.

Only bytes cross a process border; the device normalizes. What a step holds is `ml.views`' matter, and a function of its
number, so a resumed training, or one with another number of workers, sees the same bits. Workers make steps ahead, each
whole ones in turn. Cached small images, where the network has every core, are made otherwise: by all cores at once between two
steps, because a network whose operations take microseconds waits at each of them for the core that a worker is using.

B labeled images of a step, U pseudo-labeled images of a step, K classes, C H W.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml.config import ImageConfig, NoiseConfig, RuntimeConfig
from ml.cores import num_cores
from ml.errors import BadImage, DataError, LoaderLost, MlError
from ml.manifest import Manifest
from ml.schedules import TrainingPlan
from ml.selection import SelectedLabels
from ml.views import TICKETS, Broken, ImageStream, Source, Steps, StrongViews, Targets, claimed_rows, work

_WORTH_A_WORKER_SECONDS = 2.0
"""A worker takes most of a second to start; less work than this is done sooner without."""
_SECONDS_A_PIXEL = 2.5e-8
_SECONDS_AN_IMAGE = 8e-5
_SLOTS = 3
"""Steps that a worker may be ahead."""
_MOST_HELPERS = 12
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only asked how full it is
# A process forked after torch has run in parallel hangs in its first parallel operation.
_SPAWN = get_context("spawn")


class Batch(NamedTuple):
    """One step's images and targets. The images' memory is used again for a later batch."""

    images: Tensor
    """uint8 [B + U, C, H, W], labeled first; channels last in memory."""
    labels_B: Tensor
    """int64."""
    soft_BK: Tensor | None
    """What the teacher says of the labeled images, as `soft_UK`; None unless it is imitated there."""
    soft_UK: Tensor | None
    """float32, each row summing to 1; None without pseudo-labels."""


class TrainingBatches:
    """The batches of the steps from `start_step` up to `stop_step`; a context manager that ends its workers.

    `labeled` holds usable rows. With `selected`, the plan's `unlabeled_steps` have images of `unlabeled`, an image with repeat r
    standing r times in that stream; `unlabeled_noise` is the noise on them, None that on labeled ones; `labeled_probs`
    [N, K] is what a teacher says of `labeled`. Raises DataError for
    selected keys that the pool does not have, and BadImage naming the file when one has vanished or changed since the manifest
    was made.
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
        plan: TrainingPlan,
        seed: int,
        start_step: int,
        runtime: RuntimeConfig,
        unlabeled_noise: NoiseConfig | None = None,
        fade_ratio: float = 0.0,
        labeled_probs: NDArray[np.float32] | None = None,
    ) -> None:
        pool = None
        if selected is not None and unlabeled is not None and plan.unlabeled_steps:
            pool = unlabeled.take(_rows_of(selected, unlabeled))
        image_bytes = 3 * image.size**2
        cache_bytes = (len(labeled) + (0 if pool is None else len(pool))) * image_bytes
        cached = image.small_images and cache_bytes <= runtime.cache_bytes
        batch = plan.batch
        self._range = range(start_step, plan.steps)
        self._shared = cached and _takes_every_core(runtime)
        self._workers = _count_workers(
            runtime,
            shared=self._shared,
            num_steps=len(self._range),
            seconds=len(self._range) * batch * (_SECONDS_AN_IMAGE + _SECONDS_A_PIXEL * image.size**2),
            cache_bytes=cache_bytes if cached else 0,
            batch_bytes=batch * image_bytes,
        )
        self._pinned = runtime.device == "cuda"

        def views(images: Manifest, noise: NoiseConfig) -> StrongViews:
            made = StrongViews(images.locations(), image, noise)
            if cached:
                made.cache, made.filled = self._memory(len(images) * image_bytes), self._memory(len(images))
            return made

        once = ImageStream("labeled", seed, np.ones(len(labeled), dtype=np.int64))
        of_pool = None
        if pool is not None and selected is not None:
            stream, noised = ImageStream("unlabeled", seed, selected.repeats), views(pool, unlabeled_noise or noise)
            of_pool = Source(stream, noised, plan.batch_unlabeled, plan.unlabeled_steps, fade_ratio)
        self._steps = Steps(
            Source(once, views(labeled, noise), plan.batch_labeled, plan.labeled_steps),
            np.array(labeled.class_indices(class_names), dtype=np.int64),
            of_pool,
            None if pool is None else selected,
            labeled_probs,
        )
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
        if not self._workers:
            self._running = self._from_here()
        else:
            self._running = self._from_all() if self._shared else self._ahead()
        return self._running

    def _memory(self, num_bytes: int) -> Any:
        return _SPAWN.RawArray("B", num_bytes) if self._workers else np.zeros(num_bytes, dtype=np.uint8)

    def _from_here(self) -> Generator[Batch]:
        images = np.empty(self._steps.shape(), dtype=np.uint8)
        for step in self._range:
            self._steps.fill(step, images)
            yield self._batch(images, self._steps.targets(step))

    def _from_all(self) -> Generator[Batch]:
        """Every step made by this process and its workers together, when it is asked for."""
        memory = _SPAWN.RawArray("B", int(np.prod(self._steps.shape())))
        images = np.frombuffer(memory, np.uint8).reshape(self._steps.shape())
        tickets, till = _SPAWN.Pipe(duplex=False)
        os.set_blocking(tickets.fileno(), False)
        workers: list[_Worker] = []
        try:
            workers.extend(_Worker(self._steps, self._range, [memory], tickets) for _ in range(self._workers))
            for step in self._range:
                os.write(till.fileno(), TICKETS)
                for worker in workers:
                    worker.free(0)
                self._steps.fill(step, images, claimed_rows(tickets, len(images)))
                targets = self._steps.targets(step)
                for worker in workers:
                    worker.receive()
                yield self._batch(images, targets)
        finally:
            for worker in workers:
                worker.end()
            tickets.close()
            till.close()

    def _ahead(self) -> Generator[Batch]:
        """Whole steps from the workers in turn, a few of them made before they are asked for."""
        num_bytes = int(np.prod(self._steps.shape()))
        workers: list[_Worker] = []
        try:
            for place in range(self._workers):
                numbers = self._range[place :: self._workers]
                slots = [_SPAWN.RawArray("B", num_bytes) for _ in range(min(_SLOTS, len(numbers)))]
                workers.append(_Worker(self._steps, numbers, slots))
                workers[-1].free_all()
            for turn in range(len(self._range)):
                worker = workers[turn % len(workers)]
                slot, targets = worker.receive()
                yield self._batch(worker.images(slot), targets)
                worker.free(slot)
        finally:
            for worker in workers:
                worker.end()

    def _batch(self, images: Any, targets: Targets) -> Batch:
        # Channels last in memory is what the views have already, so nothing is copied here.
        tensor, labels_B = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(targets.labels_B)
        soft_BK, soft_UK = (None if soft is None else torch.from_numpy(soft) for soft in (targets.soft_BK, targets.soft_UK))
        if self._pinned:
            pinned = [None if soft is None else soft.pin_memory() for soft in (soft_BK, soft_UK)]
            return Batch(tensor.pin_memory(), labels_B.pin_memory(), *pinned)
        return Batch(tensor, labels_B, soft_BK, soft_UK)


@dataclass(init=False, slots=True)
class _Worker:
    """A process that fills some steps, or what it claims of them by tickets, in slots of shared memory, and the line to it."""

    _process: BaseProcess
    _line: Connection
    _slots: list[Any]
    _shape: tuple[int, ...]
    _turn: int

    def __init__(self, steps: Steps, numbers: range, slots: list[Any], tickets: Connection | None = None) -> None:
        self._shape, self._turn, self._slots = steps.shape(), 0, slots
        self._line, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=work, args=(steps, numbers, slots, theirs, tickets), daemon=True)
        self._process.start()
        # Only the worker holds its end now, so that its death ends the line.
        theirs.close()

    def receive(self) -> tuple[int, Any]:
        """Wait for the worker's next step: the slot with its images, and what it sent of the targets."""
        try:
            message = self._line.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            raise LoaderLost(f"a loader worker died with exit code {self._process.exitcode}") from error
        if isinstance(message, Broken):
            raise BadImage(message.message, status=message.status, path=message.path)
        if isinstance(message, MlError):
            raise message
        slot, self._turn = self._turn % len(self._slots), self._turn + 1
        return slot, message

    def images(self, slot: int) -> Any:
        return np.frombuffer(self._slots[slot], np.uint8).reshape(self._shape)

    def free_all(self) -> None:
        """Let the worker begin."""
        for slot in range(len(self._slots)):
            self.free(slot)

    def free(self, slot: int) -> None:
        """Let the worker fill the slot, again or for the first time."""
        try:
            self._line.send(slot)
        except ConnectionError:
            # It has made all its steps, or is dead, which `receive` will tell.
            return

    def end(self) -> None:
        self._line.close()
        # It holds nothing that a kill could damage, and it may be in the middle of a large image.
        self._process.kill()
        self._process.join()


def _takes_every_core(runtime: RuntimeConfig) -> bool:
    """Whether the network leaves no core to a loader worker."""
    return runtime.device == "cpu" and runtime.num_threads >= num_cores()


def _count_workers(runtime: RuntimeConfig, *, shared: bool, num_steps: int, seconds: float, cache_bytes: int, batch_bytes: int) -> int:
    """How many workers to start: those asked for, or none when their start would cost more than it saves.

    Steps that this process makes too have as many makers as the network has threads, which rest meanwhile.
    """
    asked = 0 if runtime.num_loader_workers == "auto" else runtime.num_loader_workers
    if shared and asked:
        asked = min(runtime.num_threads - 1, _MOST_HELPERS)
    asked = min(asked, num_steps)
    # Containers often have 64 MB of shared memory, and writing beyond it kills the process.
    needed = cache_bytes + (1 if shared else asked * _SLOTS) * batch_bytes
    crowded = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free < 1.25 * needed
    return 0 if crowded or seconds < _WORTH_A_WORKER_SECONDS else asked


def _rows_of(selected: SelectedLabels, unlabeled: Manifest) -> list[int]:
    """The pool's row of every selected key."""
    keys = selected.keys()
    rows = pc.index_in(keys, value_set=unlabeled.table.column("key").combine_chunks())
    if rows.null_count:
        absent = keys.filter(pc.is_null(rows)).to_pylist()
        raise DataError(f"{len(absent)} selected images are not in the pool, for example {absent[0]}", keys=absent[:100])
    return [int(row) for row in rows.to_pylist()]
