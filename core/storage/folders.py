"""Folders made of stored files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from core.storage.digests import CHUNK_BYTES, fsync_directory, storage_errors
from core.storage.interface import Storage


def materialize(storage: Storage, files: Mapping[str, str], directory: Path) -> Path:
    """Make a folder that holds the stored files (name → digest) under their names, by hard link where that is possible.

    The folder appears complete or not at all, also after a power cut; one that exists is taken as it is.
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
            for folder, _, _ in os.walk(aside):
                fsync_directory(Path(folder))
            os.replace(aside, directory)
            fsync_directory(directory.parent)
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
        with source.open("rb") as content, target.open("xb") as copy:
            shutil.copyfileobj(content, copy, CHUNK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
