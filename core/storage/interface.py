"""What every storage can do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


class Storage(Protocol):
    """Keeps files by digest."""

    @property
    def is_local(self) -> bool:
        """Whether `fetch` gives the stored file itself, so that nothing travels and its path lasts as long as the file is kept.

        Hosts that share such a storage share its file system. Of the others, a path lasts for the hour after it was given, and longer
        for whoever links the file.
        """

    @property
    def root(self) -> str:
        """Folder or `s3://…` below which `path_below(digest)` is a stored file, for those that read parts of it where it lies."""

    def put(self, path: Path) -> dict[str, Any]:
        """Keep the file; returns {digest, num_bytes}. Keeping the same content again only makes its age start anew."""

    def fetch(self, digest: str, *, verify: bool = False) -> Path:
        """A local path of the file, not to be written to; StorageDamaged when it is missing. `verify` reads it and compares."""

    def remove(self, digest: str, *, unless_touched_within_seconds: float = 0) -> None:
        """Forget the file; nothing happens when it is not there, or when somebody kept it again that recently."""

    def list_old(self, *, older_than_seconds: float, now_seconds: float) -> Iterator[str]:
        """Digests of files that were stored longer ago than that."""

    def verify(self, digest: str) -> None:
        """Read the stored file and compare; StorageDamaged when it is missing or altered."""

    def check(self) -> None:
        """Ask within a few seconds whether files can be kept; StorageError says why not."""
