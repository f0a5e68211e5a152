"""Many images one after another. Those in S3 are asked for ahead, many at once, and neighbors in a tar by one request."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import chain

from ml import objects
from ml.errors import BadImage
from ml.locations import MAX_FILE_BYTES, PARQUET, Location, check, read_bytes

AHEAD_BYTES = 16 << 20
"""Asked for and not yet taken, by one reader; beyond it only a single image that is larger."""
_REQUEST_BYTES = 4 << 20
_GAP_BYTES = 32 << 10
"""Less between two neighbors costs less than a request of its own."""
_TYPICAL_BYTES = 512 << 10
"""Of an object whose size nobody has told."""

Outcome = bytes | BadImage


def read_many(locations: Iterable[Location]) -> Iterator[Outcome]:
    """The bytes of each image, in order, or why there are none. On this machine one is read when it is asked for."""
    remaining = iter(locations)
    first = next(remaining, None)
    if first is None:
        return
    everything = chain((first,), remaining)
    if not first.is_remote or (first.offset is not None and first.path.endswith(PARQUET)):
        # A row group brings its neighbors along.
        yield from map(_read, everything)
        return
    waiting: deque[tuple[Future[list[Outcome]], int]] = deque()
    ahead = 0
    try:
        for group in _groups(everything):
            size = sum(_size(location) for location in group)
            while waiting and ahead + size > AHEAD_BYTES:
                outcomes, taken = waiting.popleft()
                yield from outcomes.result()
                ahead -= taken
            waiting.append((objects.pool().submit(_read_group, group), size))
            ahead += size
        while waiting:
            yield from waiting.popleft()[0].result()
    finally:
        for outcomes, _ in waiting:
            outcomes.cancel()


def take(outcome: Outcome) -> bytes:
    """The bytes; raises the reason when there are none."""
    if isinstance(outcome, BadImage):
        raise outcome
    return outcome


def _size(location: Location) -> int:
    return _TYPICAL_BYTES if location.length is None else location.length


def _read(location: Location) -> Outcome:
    try:
        return read_bytes(location)
    except BadImage as error:
        return error


def _groups(locations: Iterable[Location]) -> Iterator[list[Location]]:
    """Neighbors that one request brings."""
    group: list[Location] = []
    for location in locations:
        if group and not _joins(group, location):
            yield group
            group = []
        group.append(location)
    if group:
        yield group


def _joins(group: list[Location], location: Location) -> bool:
    first, last = group[0], group[-1]
    if location.path != last.path or location.offset is None or first.offset is None or last.offset is None:
        return False
    gap = location.offset - last.offset - _size(last)
    return 0 <= gap <= _GAP_BYTES and location.offset + _size(location) - first.offset <= _REQUEST_BYTES


def _read_group(group: list[Location]) -> list[Outcome]:
    first, last = group[0], group[-1]
    if len(group) == 1 or first.offset is None or last.offset is None or _size(last) > MAX_FILE_BYTES:
        return [_read(location) for location in group]
    try:
        data = objects.read(first.path, start=first.offset, length=last.offset + _size(last) - first.offset)
    except OSError:
        # Each says for itself what is wrong.
        return [_read(location) for location in group]
    starts = [location.offset - first.offset for location in group if location.offset is not None]
    return [_checked(location, data[start : start + _size(location)]) for location, start in zip(group, starts, strict=True)]


def _checked(location: Location, data: bytes) -> Outcome:
    try:
        return check(location, data)
    except BadImage as error:
        return error
