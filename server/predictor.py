"""Answers about images: exported generations in ONNX Runtime, a bounded queue before them, threads that decode and run them.

The only module that opens ONNX Runtime, and late: an API without a model never loads it. Each thread takes one image from bytes to
probabilities; images are not batched, because one thread and one image at a time is the fastest way on a CPU.

A generation is resolved once, when an image is handed in, so every answer names exactly one. After a switch the old generation
answers what it was given and is freed with its last answer.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from core.errors import BadImageRefused, NothingPromoted, Overloaded, StorageDamaged, UnsupportedMedia

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ml.pixels import Preprocessing

FILES = ("model.onnx", "preprocessing.json", "class_names.json", "calibration.json")
"""What of a generation's files the predictor needs."""
KEPT_GENERATIONS = 3
"""Generations kept loaded beside those that aliases point at: pinned ones, and the one before a promotion."""
_WARM_UPS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one generation says about one image."""

    generation_id: str
    class_names: tuple[str, ...]
    logits_K: NDArray[np.float32]
    temperature: float
    decode_seconds: float
    model_seconds: float
    queue_seconds: float

    def probabilities(self, *, calibrated: bool) -> list[float]:
        """In the order of `class_names`, summing to 1; before temperature when not `calibrated`."""
        from ml.calibration import softmax

        probs: list[float] = softmax(self.logits_K, self.temperature if calibrated else 1.0).tolist()
        return probs


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServedGeneration:
    """A generation in memory, warm."""

    id: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float
    session: Any
    latency_seconds: float = field(default=math.nan)
    """Median of one image through the network, measured at warm-up."""

    def answer(self, data: bytes, *, queue_seconds: float) -> Answer:
        """Decode `data` by the rule that training, labeling and evaluation share, and run the network on it."""
        from ml.errors import BadImage
        from ml.pixels import decode, normalize, weak_view

        started = perf_counter()
        try:
            pixels_HWC = weak_view(decode(data), self.preprocessing)
        except BadImage as error:
            refusal = UnsupportedMedia if error.status == "unsupported" else BadImageRefused
            raise refusal(str(error), image_status=error.status) from error
        images = normalize(pixels_HWC[None], self.preprocessing)
        decoded = perf_counter()
        logits_K = self.session.run(("logits",), {"images": images})[0][0]
        return Answer(
            generation_id=self.id,
            class_names=self.class_names,
            logits_K=logits_K,
            temperature=self.temperature,
            decode_seconds=decoded - started,
            model_seconds=perf_counter() - decoded,
            queue_seconds=queue_seconds,
        )


def load_generation(generation_id: str, files: Mapping[str, Path]) -> ServedGeneration:
    """Open the exported files and run the network a few times; StorageDamaged when they cannot be what they should be."""
    import numpy as np
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    from ml.pixels import Preprocessing

    missing = [name for name in FILES if name not in files]
    if missing:
        raise StorageDamaged(f"generation {generation_id} has no {', '.join(missing)} and cannot be served", generation_id=generation_id)
    # ONNX Runtime's errors have no common parent.
    runtime_errors = [value for value in vars(runtime).values() if isinstance(value, type) and issubclass(value, Exception)]
    damage: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, *runtime_errors)
    options = ort.SessionOptions()
    # One thread runs one image from its bytes to its answer; parallel are the images.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        preprocessing = Preprocessing.from_dict(json.loads(files["preprocessing.json"].read_bytes()))
        class_names = tuple(json.loads(files["class_names.json"].read_bytes()))
        temperature = float(json.loads(files["calibration.json"].read_bytes())["temperature"])
        session = ort.InferenceSession(str(files["model.onnx"]), options, providers=["CPUExecutionProvider"])
        blank = np.zeros((1, 3, preprocessing.size, preprocessing.size), np.float32)
        seconds = []
        for _ in range(_WARM_UPS):
            started = perf_counter()
            logits_1K = session.run(("logits",), {"images": blank})[0]
            seconds.append(perf_counter() - started)
    except damage as error:
        raise StorageDamaged(f"generation {generation_id} cannot be served: {error}", generation_id=generation_id) from error
    if logits_1K.shape != (1, len(class_names)) or not np.isfinite(logits_1K).all():
        raise StorageDamaged(
            f"generation {generation_id} cannot be served: {len(class_names)} classes, but outputs of shape {logits_1K.shape}"
            + ("" if np.isfinite(logits_1K).all() else " that are not finite numbers"),
            generation_id=generation_id,
        )
    return ServedGeneration(
        id=generation_id,
        class_names=class_names,
        preprocessing=preprocessing,
        temperature=temperature,
        session=session,
        latency_seconds=statistics.median(seconds),
    )


class Predictor:
    """Generations by alias and by id, and the threads that answer."""

    def __init__(
        self,
        find_files: Callable[[str], Mapping[str, Path]],
        *,
        num_threads: int,
        queue_images: int,
        deadline_seconds: float,
        kept_generations: int = KEPT_GENERATIONS,
        on_answer: Callable[[Answer], None] = lambda _answer: None,
    ) -> None:
        """`find_files(generation_id)` gives the exported files by name; whatever it raises reaches the caller of `load`."""
        self._find_files = find_files
        self._on_answer = on_answer
        self._deadline_seconds = deadline_seconds
        self._kept_generations = kept_generations
        self._num_threads = num_threads
        self.queue_images = queue_images
        self._lock = threading.Lock()
        self._aliases: dict[str, tuple[ServedGeneration, int]] = {}
        self._kept: OrderedDict[str, ServedGeneration] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self._num_inside = 0
        self._numbers = itertools.count()
        self._busy: set[int] = set()
        self._recent_seconds = 0.05
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="predictor")

    def load(self, generation_id: str) -> ServedGeneration:
        """The generation, loaded and warm; from memory when it is there. Two callers at once load it once."""
        with self._lock:
            found = self._find(generation_id)
            turn = self._loading.setdefault(generation_id, threading.Lock())
        if found is not None:
            return found
        try:
            with turn:
                with self._lock:
                    found = self._find(generation_id)
                if found is None:
                    found = load_generation(generation_id, self._find_files(generation_id))
                    with self._lock:
                        self._keep(found)
                return found
        finally:
            with self._lock:
                self._loading.pop(generation_id, None)

    def find(self, generation_id: str) -> ServedGeneration | None:
        """The generation, when it is in memory."""
        with self._lock:
            return self._find(generation_id)

    def _find(self, generation_id: str) -> ServedGeneration | None:
        if generation_id in self._kept:
            self._kept.move_to_end(generation_id)
            return self._kept[generation_id]
        return next((served for served, _ in self._aliases.values() if served.id == generation_id), None)

    def _keep(self, generation: ServedGeneration) -> None:
        self._kept[generation.id] = generation
        self._kept.move_to_end(generation.id)
        while len(self._kept) > self._kept_generations:
            self._kept.popitem(last=False)

    def switch(self, alias: str, generation: ServedGeneration, *, version: int) -> bool:
        """From now on the alias means this generation. False when this replica has seen a later move of it: then nothing changes."""
        with self._lock:
            current = self._aliases.get(alias)
            if current is not None and current[1] >= version:
                return current[1] == version
            self._aliases[alias] = (generation, version)
            self._kept.pop(generation.id, None)
            if current is not None:
                # The one before is the one a rollback asks for.
                self._keep(current[0])
            return True

    def find_alias(self, alias: str) -> ServedGeneration | None:
        """What the alias means on this replica, None when it means nothing."""
        with self._lock:
            found = self._aliases.get(alias)
            return None if found is None else found[0]

    def serving(self, alias: str) -> ServedGeneration:
        """What the alias means on this replica; NothingPromoted when it means nothing."""
        found = self.find_alias(alias)
        if found is None:
            raise NothingPromoted(
                f"nothing was promoted to the alias {alias!r} yet: PUT /api/v1/aliases/{alias} with a generation's id, "
                f"or `noisy-student promote GENERATION{'' if alias == 'production' else f' --alias {alias}'}`",
                alias=alias,
            )
        return found

    def versions(self) -> dict[str, int]:
        """Which move of each alias this replica has made."""
        with self._lock:
            return {alias: version for alias, (_, version) in self._aliases.items()}

    def kept(self) -> list[str]:
        """Ids of every generation in memory that is not there for an alias."""
        with self._lock:
            return list(self._kept)

    def forget(self, generation_id: str) -> None:
        """The generation was deleted; what it was given before is still answered."""
        with self._lock:
            self._kept.pop(generation_id, None)

    def submit(self, images: Sequence[bytes], generation: ServedGeneration) -> list[Future[Answer]]:
        """Queue all of these images or, with Overloaded, none. Each future ends with an answer or a ServiceError."""
        with self._lock:
            if self._num_inside + len(images) > self.queue_images + self._num_threads:
                raise self._overloaded(f"{self._num_inside} images are waiting for the predictor")
            self._num_inside += len(images)
        submitted = perf_counter()
        futures = []
        for data in images:
            future = self._threads.submit(self._answer, generation, data, submitted)
            future.add_done_callback(self._leave)
            futures.append(future)
        return futures

    def _overloaded(self, why: str) -> Overloaded:
        seconds = max(1, math.ceil(self._num_inside * self._recent_seconds / self._num_threads))
        return Overloaded(f"{why}; come back in {seconds} s", retry_after_seconds=seconds)

    def _leave(self, _future: Future[Answer]) -> None:
        with self._lock:
            self._num_inside -= 1

    def _answer(self, generation: ServedGeneration, data: bytes, submitted: float) -> Answer:
        waited = perf_counter() - submitted
        if waited > self._deadline_seconds:
            # Whoever asked has gone, or will soon: a late answer would only make the next one later.
            raise self._overloaded(f"the image waited {waited:.1f} s for the predictor, longer than {self._deadline_seconds:g} s")
        number = next(self._numbers)
        with self._lock:
            self._busy.add(number)
        try:
            answer = generation.answer(data, queue_seconds=waited)
        finally:
            with self._lock:
                self._busy.discard(number)
        self._recent_seconds += 0.1 * (answer.decode_seconds + answer.model_seconds - self._recent_seconds)
        self._on_answer(answer)
        return answer

    @property
    def num_inside(self) -> int:
        """Images that wait or are being answered."""
        return self._num_inside

    def busy_with(self) -> list[int]:
        """A number of its own for each image that is being answered now."""
        with self._lock:
            return list(self._busy)

    def close(self) -> None:
        """Answer what runs, drop what waits."""
        self._threads.shutdown(wait=True, cancel_futures=True)
