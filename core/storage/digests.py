"""Names of stored files, and what goes wrong with them on a disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import StorageDamaged, StorageError, StorageFull

CHUNK_BYTES = 1 << 20


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_digest(name: str) -> bool:
    """Whether this can be a SHA-256 in hexadecimal."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def place_of(digest: str) -> tuple[str, str]:
    """Folder and name of a stored file; StorageError for what is no digest, so that no name reaches another place."""
    if not is_digest(digest):
        raise StorageError(f"{digest!r} is not a SHA-256 digest")
    return digest[:2], digest


def path_below(digest: str) -> str:
    """Path of a stored file below its storage's root."""
    return "/".join(place_of(digest))


def missing(digest: str) -> StorageDamaged:
    """The error of a stored file that is not there."""
    return StorageDamaged(f"the stored file {digest} is missing", digest=digest)


def altered(digest: str, actual: str) -> StorageDamaged:
    """The error of a stored file whose content is not what its name says."""
    return StorageDamaged(f"the stored file {digest} was altered: its content has digest {actual}", digest=digest)


def fsync_directory(path: Path) -> None:
    """Make a rename in this directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Translate what the operating system says of a full or failing disk."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull(f"the disk is full while {doing}") from error
        raise StorageError(f"{doing} failed: {error}") from error
