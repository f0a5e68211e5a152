"""One image of a dataset version as it lies in its source, found through the manifest and checked against it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from core.errors import Conflict, NotFound
from ml.errors import BadImage
from ml.locations import Location, read_bytes, resolve_root
from ml.manifest import read_facts
from ml.objects import is_address

_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"BM", "image/bmp"))


def read_pool_image(manifest: Path, key: str) -> tuple[bytes, str]:
    """The image's bytes and their media type; NotFound without such a key, Conflict when it changed since its version was read."""
    row, root = _find_row(manifest, key)
    path = _path_below(root, row.get("container") or key, key)
    offset = row.get("offset")
    try:
        data = read_bytes(Location(path, offset, *((None, None) if offset is None else (row["bytes"], row["digest"]))))
    except (BadImage, OSError) as error:
        raise Conflict(f"the image {key!r} cannot be read any more: {error}", key=key) from error
    if hashlib.sha256(data).hexdigest() != row["digest"]:
        raise Conflict(f"the image {key!r} was changed since its dataset version was read; add a new version", key=key)
    return data, _media_type(data) if row["status"] == "ok" else "application/octet-stream"


def _path_below(root: str, name: str, key: str) -> str:
    root = resolve_root(root)
    if is_address(root):
        return f"{root}/{name}"
    path = (Path(root) / name).resolve()
    if Path(root).resolve() not in path.parents:
        raise NotFound(f"the image {key!r} lies outside of its dataset's folder")
    return str(path)


def _find_row(manifest: Path, key: str) -> tuple[dict[str, Any], str]:
    import pyarrow.parquet as pq

    # Versions of folders that were read long ago have no places.
    wanted = {"key", "digest", "status", "bytes", "container", "offset"} & set(pq.read_schema(manifest).names)
    # Rows are sorted by key: the filter reads the one row group whose range of keys can hold it.
    table = pq.read_table(manifest, columns=sorted(wanted), filters=[("key", "=", key)], partitioning=None)
    if table.num_rows == 0:
        raise NotFound(f"there is no image {key!r} in this dataset version")
    return table.slice(0, 1).to_pylist()[0], str(read_facts(manifest)["root"])


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((media_type for magic, media_type in _TYPES if data.startswith(magic)), "application/octet-stream")
