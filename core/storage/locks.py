"""A lock that the processes of this host take on a directory; nobody waits for a frozen one for ever."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import StorageError

_LOCK_SECONDS = 10.0
_PAUSE_SECONDS = 0.001


@contextmanager
def locked(directory: Path, kind: int) -> Iterator[None]:
    """Hold the directory's lock, shared (LOCK_SH) or alone (LOCK_EX); StorageError when it stays held for ten seconds."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with (directory / "lock").open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StorageError(f"{directory} stayed locked for {_LOCK_SECONDS:.0f} s: a process that holds it is frozen") from error
                time.sleep(_PAUSE_SECONDS)
        yield
