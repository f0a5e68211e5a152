"""Copies of stored files on this host: bounded, and never taken from under whoever uses them."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from core.storage.digests import fsync_directory, place_of
from core.storage.locks import locked

KEEP_SECONDS = 3600.0
"""A copy stays at least this long after its path was given to somebody, who opens or links it meanwhile."""
DEAD_SECONDS = 24 * 3600.0
"""No download takes this long: its process died."""
_SHARE = 16
"""A look at all copies costs a look at each, so it comes when a sixteenth of the bound was added, and makes room for another."""


class ObjectCache:
    """Copies below one directory, shared by the threads and processes of this host.

    When there are more than `max_bytes` of them, those that were used longest ago go first; one that was used within `keep_seconds`, or
    that has another hard link, is never removed, even if the bound is exceeded. What lasts longer than that must link its files.
    """

    def __init__(self, directory: Path, *, max_bytes: int, keep_seconds: float = KEEP_SECONDS) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        # The first file looks: nobody knows what earlier processes left.
        self._added_bytes = max_bytes

    def _path(self, digest: str) -> Path:
        return self.directory.joinpath(*place_of(digest))

    def find(self, digest: str) -> Path | None:
        """The copy, marked as used now; None when there is none."""
        path = self._path(digest)
        if not path.exists():
            return None
        with locked(self.directory, fcntl.LOCK_SH):
            try:
                os.utime(path)
            except FileNotFoundError:
                return None
        return path

    @contextmanager
    def adding(self, digest: str) -> Iterator[BinaryIO]:
        """A file to write; at the end of the block it is the copy, after an exception nothing is left of it."""
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".incoming-")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                num_bytes = file.tell()
            os.chmod(temporary, 0o444)
            # Renamed over a copy that another process brought meanwhile, it takes nothing away: the content is the same.
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
        self._added_bytes += num_bytes
        if self._added_bytes * _SHARE >= self._max_bytes:
            self._added_bytes = 0
            self.make_room()

    def make_room(self) -> None:
        """Remove copies until a sixteenth of the bound is free, the longest unused first."""
        copies = sorted(self._list())
        total = sum(size for _, size, _ in copies)
        if total <= self._max_bytes:
            return
        for _, size, path in copies:
            if total <= self._max_bytes - self._max_bytes // _SHARE:
                return
            if self._evict(path):
                total -= size

    def _list(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, size, path) of each copy; what dead processes left half-written is removed on the way."""
        for path in self.directory.glob("??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith(".incoming-"):
                yield found.st_mtime, found.st_size, path
            elif time.time() - found.st_mtime > DEAD_SECONDS:
                path.unlink(missing_ok=True)

    def _evict(self, path: Path) -> bool:
        # Alone: nobody can find the copy between the look and the removal.
        with locked(self.directory, fcntl.LOCK_EX):
            try:
                found = path.stat()
            except FileNotFoundError:
                return True
            if found.st_nlink > 1 or time.time() - found.st_mtime < self._keep_seconds:
                return False
            path.unlink()
            return True
