"""Files that are there whole or not at all: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from ml.errors import DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the operating system says that there is no room."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; at the end of the block it becomes `path`, after an exception nothing is left of it.

    Raises DiskFull when the operating system says that there is no room (as OSError; foreign disguises are the caller's to translate).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rename is atomic on one filesystem only, so the temporary file lies beside the target.
    aside = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        yield aside
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no room left for {path}: free some space and try again", path=str(path)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end of the block it becomes `folder`, after an exception nothing is left of it.

    `folder` must not exist yet, or be empty. Raises DiskFull like `written_aside`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{token_hex(4)}.tmp")
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush(path)
        aside.replace(folder)
        _flush(folder.parent)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no room left for {folder}: free some space and try again", path=str(folder)) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
