"""Images packed into tar shards while they are read. Their rows then say where in which shard they lie.

The same images in the same order make the same shards, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ml.files import written_aside
from ml.manifest import COLUMNS
from ml.manifest_files import Row
from ml.pixels import SHRUNK_QUALITY

_BLOCK = 512
_KEY = COLUMNS.index("key")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How images are packed."""

    shard_bytes: int = 100_000_000
    """A shard ends with the image that makes it this large."""
    resize_shorter_side: int | None = None
    """Images with a longer one are made smaller; None keeps every file as it is."""


class _Hashed:
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hashing = hashlib.sha256()
        self._place = 0

    def write(self, data: bytes) -> int:
        self._hashing.update(data)
        self._place += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._place

    def digest(self) -> str:
        return self._hashing.hexdigest()


class Packer:
    """Takes rows with their bytes, and gives the rows back once their shard is complete and has a name."""

    def __init__(self, packing: Packing, folder: Path, container_of: Callable[[str], str]) -> None:
        """Shards go into `folder`; `container_of` turns a shard's digest into the path below which it will be found."""
        self.packing = packing
        self.shards: list[Path] = []
        self.num_bytes = 0
        self.num_resized = 0
        self._folder = folder
        self._container_of = container_of
        self._waiting: list[tuple[Row, int | None]] = []
        self._shard: _Shard | None = None

    def add(self, row: Row, data: bytes | None) -> Iterator[Row]:
        """Rows whose shard is complete, perhaps none. A row without bytes is one without a place."""
        offset = None
        if data is not None:
            self._shard = self._shard or _Shard(self._folder / f"shard-{len(self.shards):06d}.tar")
            offset = self._shard.add(row[_KEY], data)
        self._waiting.append((row, offset))
        if self._shard is not None and self._shard.num_bytes >= self.packing.shard_bytes:
            yield from self.finish()

    def finish(self) -> Iterator[Row]:
        """Complete the shard that is being written, and give its rows."""
        container = None
        if self._shard is not None:
            container = self._container_of(self._shard.complete())
            self.num_bytes += self._shard.num_bytes
            self.shards.append(self._shard.path)
            self._shard = None
        waiting, self._waiting = self._waiting, []
        for row, offset in waiting:
            yield (*row[: len(COLUMNS)], None if offset is None else container, offset)

    def report(self) -> dict[str, Any]:
        """What a version's report tells of its shards."""
        side = self.packing.resize_shorter_side
        resized = {} if side is None else {"resize_shorter_side": side, "num_resized": self.num_resized, "jpeg_quality": SHRUNK_QUALITY}
        return {"num_shards": len(self.shards), "num_bytes": self.num_bytes, **resized}


class _Shard:
    """A tar file that is being written; it has its name when it is complete. One that never is goes with its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        aside = self._stack.enter_context(written_aside(path))
        self._hashed = _Hashed(self._stack.enter_context(aside.open("wb")))
        self._tar = tarfile.TarFile(fileobj=cast(BinaryIO, self._hashed), mode="w", format=tarfile.PAX_FORMAT)

    @property
    def num_bytes(self) -> int:
        return self._hashed.tell()

    def add(self, name: str, data: bytes) -> int:
        """Write a member; where its first byte lies."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        # The list of all members is for reading. Not in the stubs.
        vars(self._tar)["members"].clear()
        return self._hashed.tell() - -(-len(data) // _BLOCK) * _BLOCK

    def complete(self) -> str:
        """Its digest."""
        self._tar.close()
        self._stack.close()
        return self._hashed.digest()
