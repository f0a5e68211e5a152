"""Weak views made in processes of their own, for small images: decoding one of them is mostly Python, which runs on one core a process.

Two threads that decode 32-pixel files in one process are slower than one, and every operation of the network waits for them.
A decoding process imports Pillow and numpy only, starts in a quarter of a second, and ends when its standard input does,
so none outlives whoever started it.

    request   one JSON line: locations, preprocessing
    answer    one JSON line: statuses; then the pixels, uint8 [M, H, W, C], of those with status "ok"
"""

from __future__ import annotations

import atexit
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ml.errors import BadImage
from ml.locations import Location
from ml.pixels import Preprocessing, decode, weak_view
from ml.read_ahead import read_many, take

Pixels = npt.NDArray[np.uint8]

WORTH_ROWS = 4096
"""A process that has fewer small images to look at has decoded them before its decoders have started."""
_MAIN = "import sys; sys.path[:] = sys.argv[1:]; from ml.decoding import serve; serve()"


class Views(NamedTuple):
    """What came of some files."""

    images: Pixels
    """[M, H, W, C], the readable ones in their order."""
    statuses: list[str]
    """One per file."""


def weak_views(locations: Sequence[Location], preprocessing: Preprocessing) -> Views:
    """Read, decode and resize these images, here and now."""
    images, statuses = [], []
    for data in read_many(locations):
        try:
            images.append(weak_view(decode(take(data)), preprocessing))
            statuses.append("ok")
        except BadImage as error:
            statuses.append(error.status)
    side = preprocessing.size
    return Views(np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8), statuses)


class _Decoder:
    """One decoding process and the pipes to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _MAIN, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def weak_views(self, locations: Sequence[Location], preprocessing: Preprocessing) -> Views:
        """Like the function; OSError or ValueError when the process is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"locations": list(locations), "preprocessing": preprocessing.to_dict()})
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        statuses: list[str] = json.loads(self._process.stdout.readline())
        side = preprocessing.size
        images = np.empty((statuses.count("ok"), side, side, 3), np.uint8)
        if self._process.stdout.readinto(images.reshape(-1)) != images.nbytes:  # type: ignore[attr-defined]
            raise ValueError("the decoding process ended in the middle of an answer")
        return Views(images, statuses)

    def end(self) -> None:
        """End the process, whatever it is doing, and close the pipes."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # What could not be written to a process that is gone is written again on closing.
            with suppress(OSError):
                pipe.close()
        self._process.wait()


class Decoders:
    """A few decoding processes that threads share; each takes one list of files at a time."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: queue.SimpleQueue[_Decoder | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def weak_views(self, locations: Sequence[Location], preprocessing: Preprocessing) -> Views:
        """Like the function, in the next process that is free; in this one when that process dies, as it may where memory is short."""
        decoder = self._idle.get()
        try:
            decoder = decoder or _Decoder()
            return decoder.weak_views(locations, preprocessing)
        except (OSError, ValueError):
            if decoder is not None:
                decoder.end()
            decoder = None
            return weak_views(locations, preprocessing)
        finally:
            self._idle.put(decoder)

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for _ in range(self.count):
            decoder = self._idle.get()
            if decoder is not None:
                decoder.end()
            self._idle.put(None)


class _Shared:
    """The decoders of this process: kept from one shard to the next, because starting them costs more than decoding a small shard."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = 0
        self._decoders: Decoders | None = None

    def for_rows(self, num_rows: int, count: int) -> Decoders | None:
        with self._lock:
            self._rows += num_rows
            if self._rows < WORTH_ROWS:
                return None
            if self._decoders is None or self._decoders.count < count:
                self._decoders = Decoders(count)
                atexit.register(self._decoders.close)
            return self._decoders


_shared = _Shared()


def shared_decoders(preprocessing: Preprocessing, *, num_rows: int, count: int) -> Decoders | None:
    """This process's decoders, to look at `num_rows` more files with; None where decoding in threads is as fast or they are few.

    Pillow decodes and resizes a photograph without holding the interpreter's lock, so only small images gain.
    """
    return _shared.for_rows(num_rows, count) if preprocessing.small_images and count > 1 else None


def serve() -> None:
    """A decoding process: answer requests until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whoever reads the answers decides when to stop.
        signal.signal(number, signal.SIG_IGN)
    answers = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        views = weak_views([Location(*location) for location in request["locations"]], Preprocessing.from_dict(request["preprocessing"]))
        answers.write(json.dumps(views.statuses).encode() + b"\n")
        answers.write(views.images.data)
        answers.flush()
