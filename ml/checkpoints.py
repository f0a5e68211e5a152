"""The full state of a training at rest: network, average, optimizer, step, best so far. Damage is noticed before it is used.

A folder holds `last.ckpt`, the one before it (`last.1.ckpt`), and the best average that each of the two refers to
(`best-STEP.ckpt`). Every file ends with the SHA-256 of what stands before, and names the recipe and data it belongs to.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ml.errors import CheckpointDamaged, DiskFull
from ml.files import written_aside

State = dict[str, Any]
"""Tensors, numbers, strings, None, and dicts and lists of them: what torch loads without running code."""

_MAGIC = b"NSSCKPT1"
_TRAILER_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_CHUNK_BYTES = 1 << 20


class CheckpointFolder:
    """The checkpoints of one training. `digest` names its recipe and data; the files of another one are refused."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest
        self.last = folder / "last.ckpt"
        self.previous = folder / "last.1.ckpt"
        self._best_steps: tuple[int | None, int | None] = (None, None)

    def save_last(self, state: State, *, best_step: int | None) -> Path:
        """Keep `state` as the newest checkpoint and the newest until now as the previous one; drop what neither needs."""
        if self.last.exists():
            # A hard link first: at no moment is there neither of the two.
            self.previous.unlink(missing_ok=True)
            self.previous.hardlink_to(self.last)
        save_checkpoint(self.last, state | {"digest": self.digest, "best_step": best_step})
        self._best_steps = (self._best_steps[1], best_step)
        for path in self.folder.glob("best-*.ckpt"):
            if path not in [self._best(step) for step in self._best_steps if step is not None]:
                path.unlink(missing_ok=True)
        return self.last

    def load_last(self) -> tuple[State | None, list[CheckpointDamaged]]:
        """The newest complete state, None when there is none, and what was found damaged on the way.

        Raises CheckpointDamaged for the checkpoint of another recipe or other data: that is no accident of the disk.
        """
        damaged: list[CheckpointDamaged] = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
                self._refuse_foreign(path, state)
                best = state["best_step"]
                if best is not None:
                    load_checkpoint(self._best(best))
            except _Foreign:
                raise
            except CheckpointDamaged as error:
                damaged.append(error)
                # Removed, or the next save would make it the previous one.
                path.unlink(missing_ok=True)
                continue
            self._best_steps = (best, best)
            return state, damaged
        return None, damaged

    def save_best(self, step: int, weights: State) -> Path:
        """Keep `weights`, the average after `step` updates, as the best; earlier ones go when the next state is saved."""
        save_checkpoint(self._best(step), {"weights": weights, "digest": self.digest})
        return self._best(step)

    def load_best(self, step: int) -> State:
        """The weights that were best after `step` updates."""
        weights: State = load_checkpoint(self._best(step))["weights"]
        return weights

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:09d}.ckpt"

    def _refuse_foreign(self, path: Path, state: State) -> None:
        if state["digest"] != self.digest:
            raise _Foreign(f"{path} belongs to another recipe or other data; use another checkpoint folder", path=str(path))


class _Foreign(CheckpointDamaged):
    """An intact checkpoint in the wrong place."""


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` whole or not at all; DiskFull when there is no room, and nothing half-written stays."""
    with _disk_full_named(path), written_aside(path) as aside, aside.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            # torch wraps the write's own error into one of its C++ runtime.
            raise hashing.error or error from error
        file.write(_MAGIC + hashing.digest())


def load_checkpoint(path: Path) -> State:
    """Read a state onto the CPU; CheckpointDamaged when the file is absent, cut short or changed. Runs no code from it."""
    try:
        size = path.stat().st_size - _TRAILER_BYTES
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for chunk in _chunks(file, max(0, size)):
                digest.update(chunk)
            if file.read() != _MAGIC + digest.digest():
                raise CheckpointDamaged(f"{path} is cut short or was changed after it was written", path=str(path))
        with path.open("rb") as file:
            state: State = torch.load(io.BufferedReader(_Window(file, size)), map_location="cpu", weights_only=True)
            return state
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}", path=str(path)) from error


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(_CHUNK_BYTES, size))):
        size -= len(chunk)
        yield chunk


@contextmanager
def _disk_full_named(path: Path) -> Iterator[None]:
    """Turn what torch makes of a full disk when even its clean-up fails into DiskFull."""
    try:
        yield
    except RuntimeError as error:
        if "No space left" in str(error) or "quota exceeded" in str(error):
            raise DiskFull(f"no room left for {path}: free some space and try again", path=str(path)) from error
        raise


class _HashingFile(io.RawIOBase):
    """A file to write that hashes what passes and remembers the operating system's error, which torch hides."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


class _Window(io.RawIOBase):
    """The first `size` bytes of a file: torch looks for its directory at the end, where the trailer stands."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__()
        self._file = file
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (self._size if whence == io.SEEK_END else 0), io.SEEK_SET if whence == io.SEEK_END else whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), max(0, self._size - self.tell())))
        buffer[: len(data)] = data
        return len(data)
