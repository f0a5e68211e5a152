"""What goes into a step, as numpy: which images, under which noise, with which targets. A function of the seed and the step.

No torch: a worker process that decodes and augments starts in half a second and stays small. `ml.data` makes tensors of it.

B labeled images of a step, U pseudo-labeled images of a step, K classes, H W C.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ml.config import ImageConfig, NoiseConfig
from ml.determinism import ReusedGenerator, permutation
from ml.errors import BadImage, DataError, StoreAway, StoreRefused
from ml.locations import Location
from ml.pixels import decode, read_image, weak_image
from ml.read_ahead import Outcome, read_many, take
from ml.schedules import noised_ratio_at
from ml.selection import SelectedLabels
from ml.transforms import WITHOUT_NOISE, strong_view, strong_view_of_small, training_preprocessing

Bytes = npt.NDArray[np.uint8]

TICKETS = bytes(range(64))
"""Of one step; who takes number t out of the pipe makes the rows t, t + 64, t + 128, ..."""


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
        places: list[tuple[int, int, int]] = []
        while start < stop:
            epoch, first = divmod(start, len(self))
            numbers = permutation(len(self), self.seed, epoch, self.name)[first : first + stop - start]
            images = np.searchsorted(self._ends, numbers, side="right")
            places += [(image, epoch, number) for image, number in zip(images.tolist(), numbers.tolist(), strict=True)]
            start += len(numbers)
        return places


@dataclass(slots=True)
class StrongViews:
    """Strong views of a list of images.

    `cache` and `filled` are memory that workers may share, for small images: decoded squares, and whether each is there.
    It fills on first use. Two who fill one place at once write the same bytes.
    """

    locations: list[Location]
    config: ImageConfig
    noise: NoiseConfig
    cache: Any = None
    filled: Any = None
    _made: list[int] = field(default_factory=list)
    """Squares in the cache that nobody has been told of yet."""
    _ahead: Iterator[tuple[int, Outcome]] = field(default=iter(()), repr=False)
    """What is being read of a store for the step, in its order."""

    def strong(self, index: int, generator: np.random.Generator, *, noised_ratio: float = 1.0) -> Bytes:
        """HWC; BadImage, naming the file, when it has vanished or changed. So often there is noise on it; else it is the weak view."""
        noise = self.noise if noised_ratio >= 1 or generator.random() < noised_ratio else WITHOUT_NOISE
        if not self.config.small_images:
            return strong_view(self._read(index), self.config, noise, generator)
        if self.cache is None:
            return strong_view_of_small(self._square(index), self.config, noise, generator)
        filled = np.frombuffer(self.filled, np.uint8)
        squares = np.frombuffer(self.cache, np.uint8).reshape(-1, self.config.size, self.config.size, 3)
        if not filled[index]:
            squares[index] = self._square(index)
            self._made.append(index)
        return strong_view_of_small(squares[index], self.config, noise, generator)

    def tell_of_made(self) -> None:
        """Let others use the squares of the step before: a message has passed since, so they see the pixels, not only the sign."""
        if self._made:
            np.frombuffer(self.filled, np.uint8)[self._made] = 1
            self._made.clear()

    def read_ahead(self, indices: Sequence[int]) -> None:
        """These images will be wanted, in this order; those in S3 are asked for before."""
        if not self.locations or not self.locations[0].is_remote:
            return
        wanted = [index for index in indices if self.cache is None or not self.filled[index]]
        self._ahead = zip(wanted, read_many([self.locations[index] for index in wanted]), strict=True)

    def _square(self, index: int) -> Bytes:
        return np.asarray(weak_image(self._read(index), training_preprocessing(self.config)))

    def _read(self, index: int) -> Image.Image:
        try:
            # One that stands twice in a step may be cached by now: its second copy is passed over.
            for number, outcome in self._ahead:
                if number == index:
                    return decode(take(outcome))
            return read_image(self.locations[index])
        except BadImage as error:
            place = str(self.locations[index])
            raise BadImage(f"{place}: {error}", status=error.status, path=place) from error


@dataclass(slots=True)
class Source:
    """One of the two sources of a step."""

    stream: ImageStream
    views: StrongViews
    size: int
    """Images a step."""
    steps: range
    """In the others it has none."""
    fade_ratio: float = 0.0
    """Share of `steps`, the last ones, over which its noise falls to none."""

    def places(self, step: int) -> list[tuple[int, int, int]]:
        """Its images of this step, as `ImageStream.places` gives them."""
        if step not in self.steps:
            return []
        turn = step - self.steps.start
        return self.stream.places(turn * self.size, (turn + 1) * self.size)

    def noised_ratio(self, step: int) -> float:
        """Share of its images that have noise on them."""
        return noised_ratio_at(self.steps.stop, self.fade_ratio, step)

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """The places of its images of this step in the list of images."""
        return np.array([image for image, _, _ in self.places(step)], dtype=np.int64)


class Targets(NamedTuple):
    """What the images of a step are to be."""

    labels_B: npt.NDArray[np.int64]
    soft_BK: npt.NDArray[np.float32] | None
    soft_UK: npt.NDArray[np.float32] | None


@dataclass(slots=True)
class Steps:
    """Step number -> its images and targets. Every step has as many images."""

    labeled: Source
    labels: npt.NDArray[np.int64]
    unlabeled: Source | None
    selected: SelectedLabels | None
    labeled_probs: npt.NDArray[np.float32] | None = None
    """What a teacher says of the labeled images, [N, K]."""
    _generators: ReusedGenerator | None = field(default=None, init=False)

    def shape(self) -> tuple[int, int, int, int]:
        """Of a step's images, [B + U, H, W, C]."""
        size = self.labeled.views.config.size
        first = [source.size for source in (self.labeled, self.unlabeled) if source is not None and 0 in source.steps]
        return sum(first), size, size, 3

    def fill(self, step: int, images: Bytes, rows: Iterable[int] | None = None) -> None:
        """Write the step's strong views into `images` [B + U, H, W, C], labeled first; all of them, or these `rows`."""
        if self._generators is None:
            # Made where it is used: it cannot travel to a worker.
            self._generators = ReusedGenerator()
        sources = [self.labeled] if self.unlabeled is None else [self.labeled, self.unlabeled]
        views = [(source, place) for source in sources for place in source.places(step)]
        for source in sources:
            source.views.tell_of_made()
            if rows is None:
                source.views.read_ahead([image for of, (image, _, _) in views if of is source])
        for row in range(len(views)) if rows is None else rows:
            source, (index, epoch, number) = views[row]
            stream = source.stream
            generator = self._generators(stream.seed, "noise", stream.name, epoch, number)
            images[row] = source.views.strong(index, generator, noised_ratio=source.noised_ratio(step))

    def targets(self, step: int) -> Targets:
        """What the step's images are to be."""
        labeled = self.labeled.indices(step)
        labels_B, soft_BK = self.labels[labeled], None if self.labeled_probs is None else self.labeled_probs[labeled]
        if self.unlabeled is None or self.selected is None or step not in self.unlabeled.steps:
            return Targets(labels_B, soft_BK, None)
        return Targets(labels_B, soft_BK, self.selected.soft(self.unlabeled.indices(step)))


class Broken(NamedTuple):
    """A file that cannot be read any more, on its way out of a worker."""

    path: str
    status: str
    message: str


def claimed_rows(tickets: Connection, num_rows: int) -> Iterator[int]:
    """Rows of a step that nobody else makes, until no ticket is left: whoever is held up makes fewer."""
    while True:
        try:
            ticket = os.read(tickets.fileno(), 1)
        except BlockingIOError:
            return
        if not ticket:
            return
        yield from range(ticket[0], num_rows, len(TICKETS))


def work(steps: Steps, numbers: Sequence[int], slots: list[Any], line: Connection, tickets: Connection | None) -> None:
    """A worker's life: for each step number, wait for the number of a free slot, fill it, send the targets.

    With `tickets` it makes what it can claim of a step that others make too, and sends None. Ends when the steps are done,
    after a broken file, or when the other end of the line is gone, however it went.
    """
    # The training process answers signals, after a checkpoint; until then it needs its workers.
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    views = [np.frombuffer(slot, np.uint8).reshape(steps.shape()) for slot in slots]
    try:
        for step in numbers:
            images = views[line.recv()]
            try:
                steps.fill(step, images, None if tickets is None else claimed_rows(tickets, len(images)))
                line.send(steps.targets(step) if tickets is None else None)
            except BadImage as error:
                line.send(Broken(error.details["path"], error.status, str(error)))
                return
            except (StoreAway, StoreRefused) as error:
                line.send(error)
                return
    except (EOFError, ConnectionError):
        return
