"""A network without noise looks at images: labeling, evaluation, and the looks at validation during a training.

N rows, M rows with a readable image, K classes. On the CPU every core decodes a few images and passes them through the
network itself: no core waits for another, and a batch this small stays in its cache. On an accelerator the cores decode.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ml import calibration, decoding, evaluation, pseudo_labels
from ml.averaging import AveragedViews, is_plain
from ml.config import RuntimeConfig
from ml.cores import num_cores
from ml.devices import apply_runtime, autocast, translate_oom
from ml.errors import Interrupted, WeightsError
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.manifest import Manifest
from ml.models import WEIGHTS, LoadedGeneration, load_generation
from ml.normalization import Normalization
from ml.pixels import Preprocessing
from ml.tasks import EvaluationTask, LabelingTask
from ml.validation import to_dict

_CPU_BATCH = 8
_REFERENCE_SIDE = 224
_EVENT_SECONDS = 0.5
_LAUNCHED = 2
"""Batches that an accelerator is given beyond the one whose logits are asked for."""


class Predictions(NamedTuple):
    """What came of the rows of a manifest."""

    statuses: list[str]
    """One per row, whatever happened to it."""
    logits: NDArray[np.float32]
    """[M, K], the rows with status "ok" in their order."""


class WeakViews:
    """What an un-noised network sees of a manifest's rows, in batches; kept in memory when all of them fit into `cache_bytes`."""

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        cache_bytes: int = 0,
        decoders: decoding.Decoders | None = None,
    ) -> None:
        """`decoders` make the views in processes of their own; without them the calling thread does."""
        self.preprocessing = preprocessing
        self.decoders = decoders
        self.batch_size = batch_size
        self._locations = manifest.locations()
        self._statuses: list[str] = manifest.column("status")
        fits = len(self._locations) * 3 * preprocessing.size**2 <= cache_bytes
        self._cache: dict[int, tuple[NDArray[np.uint8], list[str]]] | None = {} if fits else None

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self._locations) / self.batch_size)

    def num_rows(self) -> int:
        return len(self._locations)

    def batch(self, index: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Images [M, H, W, C] of the batch's readable rows, and the status of every row."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        rows = range(index * self.batch_size, min((index + 1) * self.batch_size, len(self._locations)))
        make_views = decoding.weak_views if self.decoders is None else self.decoders.weak_views
        images, found = make_views([self._locations[row] for row in rows if self._statuses[row] == "ok"], self.preprocessing)
        # A file that was fine when the manifest was made may have gone since.
        latest = iter(found)
        batch = images, [next(latest) if self._statuses[row] == "ok" else self._statuses[row] for row in rows]
        if self._cache is not None:
            self._cache[index] = batch
        return batch

    def first_images(self, num_images: int) -> NDArray[np.uint8]:
        """Up to `num_images` readable images [M, H, W, C], from the first rows on."""
        found: list[NDArray[np.uint8]] = []
        for index in range(len(self)):
            found.append(self.batch(index)[0])
            if sum(map(len, found)) >= num_images:
                break
        return np.concatenate(found)[:num_images] if found else np.zeros((0, 0, 0, 3), np.uint8)


def batch_for(device: str, size: int, largest: int) -> int:
    """Images in one forward pass without gradients: at most `largest`; on a CPU as many as 8 images of 224 x 224 have pixels."""
    if device != "cpu":
        return largest
    return max(1, min(largest, _CPU_BATCH * _REFERENCE_SIDE**2 // size**2))


def forward(
    network: nn.Module, images_MHWC: NDArray[np.uint8], preprocessing: Preprocessing, runtime: RuntimeConfig
) -> NDArray[np.float32]:
    """Logits of uint8 images, in the runtime's precision, without gradients. The batch travels as bytes and is normalized on the device."""
    normalize = Normalization(preprocessing, torch.device(runtime.device))
    return _fetch(_launch(network, torch.from_numpy(images_MHWC), normalize, runtime))


def _launch(network: nn.Module, images_MHWC: Tensor, normalize: Normalization, runtime: RuntimeConfig) -> Tensor:
    """float32 [M, K] on the device, which may still be computing them."""
    with torch.inference_mode(), autocast(runtime), _memory_for(len(images_MHWC)):
        logits: Tensor = network(normalize(images_MHWC.to(runtime.device, non_blocking=True)))
        return logits.float()


def _fetch(logits_MK: Tensor) -> NDArray[np.float32]:
    """The same on the host, once they are there."""
    with _memory_for(len(logits_MK)):
        fetched: NDArray[np.float32] = logits_MK.cpu().numpy()
    return fetched


def _memory_for(num_images: int) -> AbstractContextManager[None]:
    return translate_oom(f"a batch of {num_images} images without gradients")


def predict(
    network: nn.Module,
    views: WeakViews,
    *,
    num_classes: int,
    runtime: RuntimeConfig,
    on_rows: Callable[[int], None] | None = None,
    should_stop: ShouldStop = never,
) -> Predictions:
    """Show every row to the network; `on_rows` hears how many are done. Raises Interrupted when `should_stop` says so.

    The batches are cut by row, so an image's bits do not depend on how many threads share the work.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode and would guess with noise: call eval() first")
    parts: list[NDArray[np.float32]] = [np.zeros((0, num_classes), np.float32)]
    all_statuses: list[str] = []
    shown = _on_cpu if runtime.device == "cpu" else _on_accelerator
    # Closed also when a listener fails: a traceback would keep the threads.
    with closing(shown(network, views, runtime, should_stop)) as found:
        for logits_MK, statuses in found:
            if logits_MK is not None:
                parts.append(logits_MK)
            all_statuses += statuses
            if on_rows is not None:
                on_rows(len(all_statuses))
    return Predictions(all_statuses, np.concatenate(parts))


_Shown = tuple[NDArray[np.float32] | None, list[str]]
"""Logits of the readable rows of a batch, None when there are none; the status of every row."""


def _on_cpu(network: nn.Module, views: WeakViews, runtime: RuntimeConfig, should_stop: ShouldStop) -> Generator[_Shown]:
    """Threads that take whole batches from file to logits."""

    def work(index: int) -> _Shown:
        images_MHWC, statuses = views.batch(index)
        return (forward(network, images_MHWC, views.preprocessing, runtime) if len(images_MHWC) else None), statuses

    callers = num_callers(runtime)
    with _one_thread_each():
        # A thread waits while another process decodes for it, so that never more are at work than cores.
        yield from _in_order(work, len(views), callers, should_stop, ahead=3 * callers)


def _on_accelerator(network: nn.Module, views: WeakViews, runtime: RuntimeConfig, should_stop: ShouldStop) -> Generator[_Shown]:
    """Threads make the batches; the device has the next ones before the logits of a batch are asked for."""
    normalize = Normalization(views.preprocessing, torch.device(runtime.device))
    launched: deque[tuple[Tensor | None, list[str]]] = deque()

    def fetched() -> _Shown:
        logits_MK, statuses = launched.popleft()
        return (None if logits_MK is None else _fetch(logits_MK)), statuses

    with closing(host_batches(views, runtime, should_stop)) as batches:
        for images_MHWC, statuses in batches:
            launched.append((_launch(network, images_MHWC, normalize, runtime) if len(images_MHWC) else None, statuses))
            if len(launched) > _LAUNCHED:
                yield fetched()
    while launched:
        yield fetched()


def host_batches(views: WeakViews, runtime: RuntimeConfig, should_stop: ShouldStop = never) -> Generator[tuple[Tensor, list[str]]]:
    """What `views.batch` gives, in order, made by threads, in memory that a device can copy from while the host goes on."""

    def work(index: int) -> tuple[Tensor, list[str]]:
        images_MHWC, statuses = views.batch(index)
        images = torch.from_numpy(images_MHWC)
        return (images.pin_memory() if runtime.device == "cuda" and len(images) else images), statuses

    callers = num_callers(runtime)
    yield from _in_order(work, len(views), callers, should_stop, ahead=callers + _LAUNCHED)


def num_callers(runtime: RuntimeConfig) -> int:
    """Threads that share the work: on a CPU those that training would use for the network and for loading, but not more than cores.

    Beside an accelerator every core decodes, because the network is not there.
    """
    if runtime.device != "cpu":
        return num_cores()
    workers = runtime.num_loader_workers
    return max(1, min(num_cores(), runtime.num_threads + (0 if workers == "auto" else workers)))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within the block each calling thread computes alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_order(work: Callable[[int], Any], count: int, callers: int, should_stop: ShouldStop, *, ahead: int) -> Generator[Any]:
    """Results of work(0), work(1), ... in order, with at most `ahead` of them on their way so that memory stays flat."""
    pool = ThreadPoolExecutor(callers, thread_name_prefix="predict")
    waiting: deque[Future[Any]] = deque()
    try:
        for index in range(count):
            waiting.append(pool.submit(work, index))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
            if should_stop():
                raise Interrupted("stopped between two batches; what was not written is done again")
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def label(task: LabelingTask, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> dict[str, Any]:
    """Write one shard of guesses of an un-noised generation, one row per image; a complete one that is there is left alone.

    Returns `num_rows`, `statuses` (count of each), `num_changed` (images that are not any more what the manifest says), `skipped`,
    `seconds`, `images_per_second` and the shard's `facts`.
    """
    started = time.monotonic()
    device = apply_runtime(task.runtime)
    rows = Manifest.read(task.unlabeled, start=task.start, stop=task.stop)
    generation = load_generation(Path(task.generation), device)
    facts = _shard_facts(task, rows, generation)
    if pseudo_labels.is_complete(task.output, **facts):
        statuses = pseudo_labels.read_shard(task.output, ["status"])["status"].to_pylist()
        return _summary(rows, statuses, facts, seconds=time.monotonic() - started, skipped=True)
    on_event(Event(kind="stage", data={"stage": "labeling"}))
    network = cast_once(generation.network) if task.runtime.precision == "bf16" else generation.network
    num_classes, averages = len(generation.class_names), not is_plain(task.labeling.views)
    if averages:
        network = AveragedViews(network, task.labeling.views, temperature=facts["temperature"]).eval()
    views = open_views(rows, generation.preprocessing, task.runtime, largest_batch=task.labeling.batch_size)
    predictions = predict(
        network,
        views,
        num_classes=num_classes + averages,
        runtime=task.runtime,
        on_rows=_progress(on_event, len(rows), "images"),
        should_stop=should_stop,
    )
    if not np.isfinite(predictions.logits).all():
        raise WeightsError(f"the generation in {task.generation} gives logits that are not finite numbers", folder=task.generation)
    logits_MK, agreement_M = predictions.logits[:, :num_classes], predictions.logits[:, num_classes] if averages else None
    pseudo_labels.write_shard(
        task.output,
        keys=rows.column("key"),
        statuses=predictions.statuses,
        # The mean of several views has its temperature already.
        probs_MK=calibration.softmax(logits_MK, 1.0 if averages else facts["temperature"]).astype(np.float32),
        agreement_M=agreement_M,
        class_names=generation.class_names,
        stored_probabilities=task.labeling.stored_probabilities,
        facts=facts,
    )
    return _summary(rows, predictions.statuses, facts, seconds=time.monotonic() - started, skipped=False)


def open_views(rows: Manifest, preprocessing: Preprocessing, runtime: RuntimeConfig, *, largest_batch: int) -> WeakViews:
    """The views of a long look at files that were not looked at before."""
    decoders = decoding.shared_decoders(preprocessing, num_rows=len(rows), count=num_callers(runtime))
    batch_size = batch_for(runtime.device, preprocessing.size, largest_batch)
    return WeakViews(rows, preprocessing, batch_size=batch_size, decoders=decoders)


def cast_once(network: nn.Module) -> nn.Module:
    """Hold the weights in bf16 that autocast would cast anew for every batch; the same bits, a few percent faster."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return network


def _shard_facts(task: LabelingTask, rows: Manifest, generation: LoadedGeneration) -> dict[str, Any]:
    """What the labels depend on: a shard with other facts is not this one."""
    with (Path(task.generation) / WEIGHTS).open("rb") as file:
        weights_digest = file_digest(file, "sha256").hexdigest()
    return {
        "weights_digest": weights_digest,
        "preprocessing_digest": generation.preprocessing.digest(),
        "rows_digest": rows.digest(),
        "start": task.start,
        "stop": task.stop,
        "precision": task.runtime.precision,
        "temperature": generation.temperature if task.labeling.calibrate else 1.0,
        "stored_probabilities": task.labeling.stored_probabilities,
        # Absent from the shards of one plain view, as it was before there were others.
        "views": None if is_plain(views := task.labeling.views) else to_dict(views) | {"zooms": list(views.zooms)},
    }


def _summary(rows: Manifest, statuses: Sequence[str], facts: dict[str, Any], *, seconds: float, skipped: bool) -> dict[str, Any]:
    rate = 0.0 if skipped else len(statuses) / max(seconds, 1e-9)
    return {
        "num_rows": len(statuses),
        "statuses": dict(Counter(statuses)),
        "num_changed": sum(before != found for before, found in zip(rows.column("status"), statuses, strict=True)),
        "skipped": skipped,
        "seconds": seconds,
        "images_per_second": rate,
        "facts": facts,
    }


def _progress(on_event: OnEvent, total: int, unit: str) -> Callable[[int], None]:
    """A listener for `predict` that reports at most twice a second, and the end."""
    started = time.monotonic()
    reported = started

    def on_rows(done: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if done < total and now - reported < _EVENT_SECONDS:
            return
        reported = now
        rate = done / max(now - started, 1e-9)
        data = {"done": done, "total": total, "unit": unit, "images_per_second": rate, "eta_seconds": (total - done) / max(rate, 1e-9)}
        on_event(Event(kind="progress", data=data))

    return on_rows


def evaluate(
    task: EvaluationTask, on_event: OnEvent = ignore, should_stop: ShouldStop = never, *, predictions: Path | None = None
) -> dict[str, Any]:
    """Measure an exported generation in fp32: `ml.evaluation.evaluate_logits`, the temperature, and the unreadable files.

    `predictions` names a file to write, so that generations can be compared pairwise.
    """
    runtime = replace(task.runtime, precision="fp32")
    generation = load_generation(Path(task.generation), apply_runtime(runtime))
    preprocessing = generation.preprocessing if task.image is None else Preprocessing.from_config(task.image)
    manifest = Manifest.read(task.manifest)
    on_event(Event(kind="stage", data={"stage": "evaluating"}))
    views = open_views(manifest, preprocessing, runtime, largest_batch=256)
    num_classes = len(generation.class_names)
    found = predict(
        generation.network,
        views,
        num_classes=num_classes,
        runtime=runtime,
        on_rows=_progress(on_event, len(manifest), "images"),
        should_stop=should_stop,
    )
    return measure(found, manifest, generation.class_names, temperature=generation.temperature, predictions=predictions)


def measure(
    found: Predictions, manifest: Manifest, class_names: Sequence[str], *, temperature: float, predictions: Path | None = None
) -> dict[str, Any]:
    """Figures of `found` over the readable rows of `manifest`; also writes its `predictions` file when one is named."""
    readable = [row for row, status in enumerate(found.statuses) if status == "ok"]
    rows = manifest.take(readable)
    labels_M = np.asarray(rows.class_indices(class_names), np.int64)
    metrics = evaluation.evaluate_logits(found.logits, labels_M, class_names, temperature=temperature)
    if predictions is not None:
        keys = rows.column("key")
        evaluation.write_predictions(predictions, keys, labels_M, found.logits, class_names=class_names, temperature=temperature)
    return metrics | {"temperature": temperature, "num_unreadable": len(found.statuses) - len(readable)}
