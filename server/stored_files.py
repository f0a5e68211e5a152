"""Stored files for those who read them here: a sweep may come between the look at a row and the opening, and while they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from core.db.files import find_named_digests
from core.db.session import Database
from core.errors import NotFound, StorageDamaged
from core.storage import Storage


class StoredFiles:
    """Opened by digest; what is open stays readable, whatever is removed."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database = database
        self._storage = storage

    def open(self, digest: str) -> BinaryIO:
        """NotFound when the file went with the row that named it; StorageDamaged when a row still does."""
        try:
            return self._storage.fetch(digest).open("rb")
        except (FileNotFoundError, StorageDamaged) as error:
            with self._database.reading() as session:
                if not find_named_digests(session, [digest]):
                    raise NotFound("what was asked for was removed a moment ago; ask again") from error
            if isinstance(error, StorageDamaged):
                raise
            raise StorageDamaged(f"the stored file {digest} is missing", digest=digest) from error

    @contextmanager
    def reading(self, digest: str) -> Iterator[Path]:
        """A path for the length of the block, for those that open by path."""
        with self.open(digest) as file:
            yield _path_of(file)

    def send(self, digest: str, **options: Any) -> FileResponse:
        """The file as an answer; `options` are those of FileResponse."""
        return _OpenFileResponse(self.open(digest), **options)


def _path_of(file: BinaryIO) -> Path:
    """Linux opens by this path what is open already, also when it has no other name any more."""
    return Path(f"/proc/self/fd/{file.fileno()}")


class _OpenFileResponse(FileResponse):
    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(_path_of(file), stat_result=os.fstat(file.fileno()), **options)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)
