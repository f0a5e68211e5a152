"""Below what a source lies: a folder of this machine, or a prefix of a bucket."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ml import objects


class Root(Protocol):
    """Paths of containers and images are relative to it; as text it is what a manifest keeps."""

    is_remote: bool

    def open(self, name: str) -> BinaryIO:
        """Any place of it can be read; OSError when it is not there."""

    def open_table(self, name: str) -> Any:
        """What pyarrow takes for a file."""

    def has_file(self, name: str) -> bool:
        """Whether it is there."""

    def leads_out(self, name: str, *, is_folder: bool = False) -> bool:
        """Whether a symbolic link does, on the way to it or, unless it is a folder, the file itself."""


class Folder:
    """On this machine; resolved."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def open_table(self, name: str) -> Any:
        return self.path / name

    def has_file(self, name: str) -> bool:
        return (self.path / name).is_file()

    def leads_out(self, name: str, *, is_folder: bool = False) -> bool:
        path = self.path / name
        return (is_folder or path.is_symlink()) and not path.resolve().is_relative_to(self.path)


class Prefix:
    """In S3. Nothing leads out of it."""

    is_remote = True

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __str__(self) -> str:
        return self.address

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(self.open_table(name)))

    def open_table(self, name: str) -> Any:
        return objects.ObjectFile(f"{self.address}/{name}")

    def has_file(self, name: str) -> bool:
        return objects.find(f"{self.address}/{name}") is not None

    def leads_out(self, name: str, *, is_folder: bool = False) -> bool:  # noqa: ARG002  a folder needs to look
        return False
