"""Files in a directory. Written aside, fsynced, renamed: a name that exists is complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.errors import StorageError
from core.storage.digests import CHUNK_BYTES, altered, digest_of, fsync_directory, missing, place_of, storage_errors
from core.storage.locks import locked


class LocalStorage:
    """Files below one directory, in folders of the digest's first two characters."""

    is_local = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def root(self) -> str:
        return str(self.directory.resolve())

    def _path(self, digest: str) -> Path:
        return self.directory.joinpath(*place_of(digest))

    def put(self, path: Path) -> dict[str, Any]:
        """Copy the file in under its digest: that of what was copied, should somebody still write to it."""
        with storage_errors(f"storing {path.name}"):
            digest = digest_of(path)
            target = self._path(digest)
            num_bytes = path.stat().st_size
            if self._renew(target, digest, num_bytes):
                return {"digest": digest, "num_bytes": num_bytes}
            target.parent.mkdir(parents=True, exist_ok=True)
            # Rename is atomic on one filesystem only, so the temporary file lies beside the target.
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".incoming-")
            try:
                hashing = hashlib.sha256()
                with os.fdopen(handle, "wb") as copy, path.open("rb") as source:
                    while chunk := source.read(CHUNK_BYTES):
                        copy.write(chunk)
                        hashing.update(chunk)
                    num_bytes = copy.tell()
                    copy.flush()
                    os.fsync(copy.fileno())
                digest = hashing.hexdigest()
                target = self._path(digest)
                target.parent.mkdir(exist_ok=True)
                os.chmod(temporary, 0o444)
                with locked(self.directory, fcntl.LOCK_SH):
                    os.replace(temporary, target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            fsync_directory(target.parent)
            return {"digest": digest, "num_bytes": num_bytes}

    def _renew(self, target: Path, digest: str, num_bytes: int) -> bool:
        """Let the clock of a file that is there start anew, so that a sweep does not remove what is about to be named.

        False when there is none, or one that was altered: whoever brings the content again mends it.
        """
        try:
            if target.stat().st_size != num_bytes or digest_of(target) != digest:
                return False
            with locked(self.directory, fcntl.LOCK_SH):
                os.utime(target)
        except FileNotFoundError:
            # Never there, or swept since the look before.
            return False
        return True

    def fetch(self, digest: str, *, verify: bool = False) -> Path:
        """The file itself."""
        path = self._path(digest)
        if not path.exists():
            raise missing(digest)
        if verify:
            self.verify(digest)
        return path

    def remove(self, digest: str, *, unless_touched_within_seconds: float = 0) -> None:
        """Unlink it."""
        path = self._path(digest)
        if not path.exists():
            return
        with locked(self.directory, fcntl.LOCK_EX), suppress(FileNotFoundError):
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
        try:
            actual = digest_of(self.fetch(digest))
        except FileNotFoundError as error:
            raise missing(digest) from error
        if actual != digest:
            raise altered(digest, actual)

    def check(self) -> None:
        """Write a file that nobody sees."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(b"ready")
        except OSError as error:
            raise StorageError(f"the storage directory is not writable: {error.strerror}") from error
