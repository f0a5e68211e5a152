"""Files at rest, named by the SHA-256 of their content: in a directory (`LocalStorage`) or in an S3 bucket (`S3Storage`).

A name that exists is complete. Nothing outside this folder builds a path or a key of an object.
"""

from __future__ import annotations

from core.storage.digests import CHUNK_BYTES, digest_of, fsync_directory, path_below, storage_errors
from core.storage.folders import materialize
from core.storage.interface import Storage
from core.storage.local import LocalStorage
from core.storage.making import make_storage
from core.storage.s3 import S3Storage

__all__ = [
    "CHUNK_BYTES",
    "LocalStorage",
    "S3Storage",
    "Storage",
    "digest_of",
    "fsync_directory",
    "make_storage",
    "materialize",
    "path_below",
    "storage_errors",
]
