"""Files at rest, named by the SHA-256 of their content. Written aside, fsynced, renamed: a name that exists is complete.

`Storage` is what an S3 store will implement too; nothing outside this file builds a path of an object.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from core.errors import StorageDamaged, StorageError, StorageFull

CHUNK_BYTES = 1 << 20


class Storage(Protocol):
    """Keeps files by digest."""

    def put(self, path: Path) -> dict[str, Any]:
        """Keep the file; returns {digest, num_bytes}. Keeping the same content again changes nothing."""

    def fetch(self, digest: str) -> Path:
        """A local path of the file, not to be written to; StorageDamaged when it is missing."""

    def remove(self, digest: str, *, unless_touched_within_seconds: float = 0) -> None:
        """Forget the file; nothing happens when it is not there, or when somebody kept it again that recently."""

    def list_old(self, *, older_than_seconds: float, now_seconds: float) -> Iterator[str]:
        """Digests of files that were stored longer ago than that."""

    def verify(self, digest: str) -> None:
        """Read the file and compare; StorageDamaged when it is missing or altered."""


class LocalStorage:
    """Files below one directory, in folders of the digest's first two characters."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise StorageError(f"{digest!r} is not a SHA-256 digest")
        return self.directory / digest[:2] / digest

    def put(self, path: Path) -> dict[str, Any]:
        """Copy (or, on one filesystem, link) the file in under its digest."""
        with storage_errors(f"storing {path.name}"):
            digest = digest_of(path)
            target = self._path(digest)
            num_bytes = path.stat().st_size
            if target.exists() and target.stat().st_size == num_bytes:
                # Its clock starts anew, so that a sweep does not remove what is about to be named.
                os.utime(target)
                return {"digest": digest, "num_bytes": num_bytes}
            target.parent.mkdir(parents=True, exist_ok=True)
            # Rename is atomic on one filesystem only, so the temporary file lies beside the target.
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".incoming-")
            try:
                with os.fdopen(handle, "wb") as copy, path.open("rb") as source:
                    shutil.copyfileobj(source, copy, CHUNK_BYTES)
                    copy.flush()
                    os.fsync(copy.fileno())
                os.chmod(temporary, 0o444)
                os.replace(temporary, target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            fsync_directory(target.parent)
            return {"digest": digest, "num_bytes": num_bytes}

    def fetch(self, digest: str) -> Path:
        """The file itself."""
        path = self._path(digest)
        if not path.exists():
            raise StorageDamaged(f"the stored file {digest} is missing", digest=digest)
        return path

    def remove(self, digest: str, *, unless_touched_within_seconds: float = 0) -> None:
        """Unlink it."""
        path = self._path(digest)
        with suppress(FileNotFoundError):
            # A sweep looked at names a while ago; whoever kept the file since then is about to name it.
            if time.time() - path.stat().st_mtime >= unless_touched_within_seconds:
                path.unlink()

    def list_old(self, *, older_than_seconds: float, now_seconds: float) -> Iterator[str]:
        """By modification time; half-written files of dead processes are removed on the way."""
        for path in self.directory.glob("??/*"):
            try:
                old = now_seconds - path.stat().st_mtime > older_than_seconds
            except FileNotFoundError:
                continue
            if old and path.name.startswith(".incoming-"):
                path.unlink(missing_ok=True)
            elif old:
                yield path.name

    def verify(self, digest: str) -> None:
        """Hash it again."""
        actual = digest_of(self.fetch(digest))
        if actual != digest:
            raise StorageDamaged(f"the stored file {digest} was altered: its content has digest {actual}", digest=digest)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def materialize(storage: Storage, files: Mapping[str, str], directory: Path) -> Path:
    """Make a folder that holds the stored files (name → digest) under their names, by hard link where that is possible.

    The folder appears complete or not at all; one that exists is taken as it is.
    """
    if directory.exists():
        return directory
    with storage_errors(f"preparing {directory.name}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".incoming-"))
        try:
            for name, digest in files.items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(storage.fetch(digest), target)
            os.replace(aside, directory)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            # Another process was faster: what it made has the same content.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and directory.exists():
                return directory
            raise
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return directory


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
