"""Where an image's bytes lie, and the one place that reads them: a file, a stretch of a tar file, a row of a Parquet file.

Each on this machine or in S3 (`s3://…`). Neither numpy nor torch. Containers stay open between two images; one that was replaced
meanwhile is opened anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ml import objects
from ml.errors import BadImage, DataError
from ml.image_columns import find_columns
from ml.object_errors import TooLarge

MAX_FILE_BYTES = 256 * 1024 * 1024
PARQUET = ".parquet"
"""Ending of the containers in which an offset counts rows; in all others it counts bytes."""
STORED = "stored:"
"""Root of manifests whose images were packed into shards among the service's own files."""
_OPEN_FILES = 256
_OPEN_TABLES = 32
"""Fewer: what a Parquet file says of its row groups is held with it."""
_ROW_GROUP_BYTES = 256 * 1024 * 1024
"""Decoded image columns of Parquet files that a process keeps; the latest one always."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)

_Opened = TypeVar("_Opened")
_stored_at: str | None = None


class Location(NamedTuple):
    """Where to find one image; JSON takes it as a list."""

    path: str
    """The image's own file, or the container."""
    offset: int | None = None
    """First byte in a tar file, number of the row in a Parquet file; None: the whole file."""
    length: int | None = None
    """Bytes that must come of it; None where that is not known yet."""
    digest: str | None = None
    """SHA-256, hex, of what must come of it; None for a file of its own on this machine, whose length must do."""

    def __str__(self) -> str:
        if self.offset is None:
            return self.path
        return f"{self.path}, {'row' if self.path.endswith(PARQUET) else 'byte'} {self.offset}"

    @property
    def is_remote(self) -> bool:
        """In S3."""
        return objects.is_address(self.path)


def find_stored_at(root: str) -> None:
    """From now on this process finds packed images below this folder or address."""
    global _stored_at
    _stored_at = root


def resolve_root(root: str) -> str:
    """Of a manifest, from this process: an absolute path or an address."""
    if root == STORED:
        if _stored_at is None:
            raise DataError("these images were packed by the service, and lie among its files; they are read by its workers only")
        return _stored_at
    return root if objects.is_address(root) else str(Path(root).absolute())


def read_bytes(place: Location | str | Path) -> bytes:
    """The bytes of an image.

    BadImage says `missing` when the file is gone or may not be read, `changed` when it is not what it was, `too_large`
    above MAX_FILE_BYTES, `unsupported` for a pipe or a device.
    """
    location = place if isinstance(place, Location) else Location(str(place))
    if location.length is not None and location.length > MAX_FILE_BYTES:
        raise _too_large(location, location.length)
    try:
        data = _read(location)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise BadImage(f"{location} cannot be read: {error.strerror}", status="missing", path=str(location)) from error
    return check(location, data)


def check(location: Location, data: bytes) -> bytes:
    """The same bytes; BadImage says `changed` when they are not what the manifest was made of."""
    if location.length is not None and len(data) != location.length:
        raise BadImage(f"{location} has {len(data)} bytes, it had {location.length}", status="changed", path=str(location))
    if location.digest and hashlib.sha256(data).hexdigest() != location.digest:
        raise BadImage(f"{location} holds something else than when it was listed", status="changed", path=str(location))
    return data


def _read(location: Location) -> bytes:
    if location.offset is not None and location.path.endswith(PARQUET):
        return _read_row(location, location.offset)
    if location.is_remote:
        return _read_object(location)
    return _read_file(location) if location.offset is None else _read_stretch(location, location.offset)


def _read_object(location: Location) -> bytes:
    try:
        length = None if location.offset is None else location.length
        return objects.read(location.path, start=location.offset or 0, length=length, most=MAX_FILE_BYTES)
    except TooLarge as error:
        raise _too_large(location, error.num_bytes) from error


def _too_large(location: Location, size: int) -> BadImage:
    message = f"the file has {size} bytes, at most {MAX_FILE_BYTES} are read"
    return BadImage(message, status="too_large", path=str(location), num_bytes=size)


def _open_at_once(path: str, flags: int) -> int:
    # Opening a pipe would wait for a writer, perhaps for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _read_file(location: Location) -> bytes:
    try:
        with open(location.path, "rb", buffering=0, opener=_open_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise BadImage(f"{location} is not a regular file", status="unsupported", path=str(location))
            if facts.st_size > MAX_FILE_BYTES:
                raise _too_large(location, facts.st_size)
            return file.read()
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise BadImage(f"{location} is not a regular file", status="unsupported", path=str(location)) from error
        raise


_Stamp = tuple[int, int, int, int]
_IN_STORE: _Stamp = (0, 0, 0, 0)


def _stamp(facts: os.stat_result) -> _Stamp:
    """Differs when another file has come under the same name, or the file was written to."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


class _Kept(Generic[_Opened]):
    """The containers that were used last, each opened once for all threads."""

    def __init__(self, opening: Callable[[str], _Opened], most: int) -> None:
        self._opening, self._most = opening, most
        self._opened: OrderedDict[str, tuple[_Stamp, _Opened]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> _Opened:
        """OSError when it cannot be opened."""
        # Asking a store each time would cost as much as reading.
        found = _IN_STORE if objects.is_address(path) else _stamp(os.stat(path))
        with self._lock:
            stamp, opened = self._opened.get(path, (None, None))
            if opened is None or stamp != found:
                opened = self._opening(path)
                self._opened[path] = (found, opened)
            self._opened.move_to_end(path)
            while len(self._opened) > self._most:
                # Whoever still reads from it holds it open.
                self._opened.popitem(last=False)
            return opened

    def forget(self, path: str) -> None:
        """Open it anew when it is needed again."""
        with self._lock:
            self._opened.pop(path, None)

    def clear(self) -> None:
        with self._lock:
            self._opened.clear()


class _Stretches:
    """An open file of which stretches are read; closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


_stretches: _Kept[_Stretches] = _Kept(_Stretches, _OPEN_FILES)


def _read_stretch(location: Location, offset: int) -> bytes:
    container = _stretches.get(location.path)
    # Not seek and read: threads share the file.
    return os.pread(container.descriptor, location.length or 0, offset)


class _Rows:
    """An open Parquet file of images, and which row groups its rows lie in."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet as pq

        source = objects.ObjectFile(path) if objects.is_address(path) else None
        self.etag: str | None = None if source is None else source.etag
        self.file = pq.ParquetFile(path if source is None else source)
        self.columns = find_columns(self.file.schema_arrow, of=path)
        metadata = self.file.metadata
        self.ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))

    def read_group(self, group: int) -> Any:
        """The images' bytes, as an arrow array."""
        import pyarrow.compute as pc

        column = self.file.read_row_group(group, columns=[self.columns.bytes_path()]).column(self.columns.image)
        return pc.struct_field(column, "bytes") if self.columns.is_struct else column


class _RowGroups:
    """Decoded row groups that were used last, for all threads: neighbors in a manifest are mostly neighbors in the file."""

    def __init__(self) -> None:
        self._files: _Kept[_Rows] = _Kept(_Rows, _OPEN_TABLES)
        self._groups: OrderedDict[tuple[int, int], tuple[_Rows, Any]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def read(self, path: str, row: int) -> bytes | None:
        """The bytes in that row; None where there are none."""
        with self._lock:
            rows = self._files.get(path)
            group = bisect_right(rows.ends, row)
            if group == len(rows.ends):
                raise IndexError(f"{path} has {rows.ends[-1] if rows.ends else 0} rows")
            images = self._group(rows, group)
        value: bytes | None = images[row - (rows.ends[group - 1] if group else 0)].as_py()
        return value

    def forget(self, path: str) -> None:
        self._files.forget(path)

    def forget_replaced(self, path: str) -> bool:
        """Whether the object is another one than when it was opened; then it is opened anew."""
        with self._lock:
            is_replaced: bool = self._files.get(path).etag != objects.ObjectFile(path).etag
            if is_replaced:
                self._files.forget(path)
        return is_replaced

    def clear(self) -> None:
        with self._lock:
            self._files.clear()
            self._groups.clear()
            self._num_bytes = 0

    def _group(self, rows: _Rows, group: int) -> Any:
        place = (id(rows), group)
        if place not in self._groups:
            images = rows.read_group(group)
            # The file is kept with the group, so that no other one gets its id meanwhile.
            self._groups[place] = (rows, images)
            self._num_bytes += images.nbytes
        self._groups.move_to_end(place)
        while self._num_bytes > _ROW_GROUP_BYTES and len(self._groups) > 1:
            _, (_, dropped) = self._groups.popitem(last=False)
            self._num_bytes -= dropped.nbytes
        return self._groups[place][1]


_row_groups = _RowGroups()


def forget(path: str) -> None:
    """Open this Parquet file anew when it is read next; one in S3 may have been replaced, which is not asked for every image."""
    _row_groups.forget(path)


def forget_all() -> None:
    """Let go of open containers and of what was decoded of them: whoever has read all of a source needs none of it again."""
    _stretches.clear()
    _row_groups.clear()


def _read_row(location: Location, row: int) -> bytes:
    if location.digest is None or not location.is_remote:
        return _decode_row(location, row)
    try:
        return check(location, _decode_row(location, row))
    except (BadImage, OSError):
        # Perhaps the object was replaced since it was opened, by one that holds this image where the manifest says.
        if not _row_groups.forget_replaced(location.path):
            raise
        return _decode_row(location, row)


def _decode_row(location: Location, row: int) -> bytes:
    import pyarrow as pa

    try:
        data = _row_groups.read(location.path, row)
    except (IndexError, DataError, pa.ArrowInvalid) as error:
        raise BadImage(f"{location} cannot be read: {error}", status="changed", path=str(location)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # What pyarrow raises on pages that cannot be decompressed.
        raise BadImage(f"{location} is damaged: {error}", status="undecodable", path=str(location)) from error
    if data is None:
        raise BadImage(f"{location} has no bytes, only a path", status="missing", path=str(location))
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(location, len(data))
    return data
