"""What a request names as a source of images, and whether it may."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.db import datasets as rows
from core.errors import FolderRefused, InvalidRequest
from core.settings import Settings
from ml.errors import DataError
from ml.objects import is_address
from ml.sources import Format, format_of_file, locate

SourcePath = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]+$")]
STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, regex_engine="python-re")


class Pack(BaseModel):
    """Copies of the images, in tar shards among the service's own files."""

    model_config = STRICT

    shard_bytes: Annotated[int, Field(ge=1_000_000, le=10_000_000_000)] = 100_000_000
    """A shard ends with the image that makes it this large."""
    resize_shorter_side: Annotated[int, Field(ge=16, le=8192)] | None = None
    """Images whose shorter side is longer are made smaller, and written anew: JPEG of quality 95, or PNG where the file was PNG or BMP."""


class SourceOfImages(BaseModel):
    """Where the images lie: a `folder`, or a `path` of anything that can be read. Nothing is copied, unless to `pack`."""

    model_config = STRICT | {
        "json_schema_extra": {
            "examples": [
                {"folder": "/data/flowers/labeled"},
                {"path": "/data/flowers/shard-{000..099}.tar"},
                {"path": "/data/flowers/hub/data", "format": "parquet", "split": "train"},
                {"path": "/data/flowers/images.csv"},
                {"path": "s3://flowers/unlabeled"},
                {"folder": "/data/flowers/unlabeled", "pack": {"resize_shorter_side": 256}},
            ]
        }
    }

    folder: SourcePath | None = None
    """Absolute path on the server, below one of the configured roots. Labeled and evaluation: one folder per class."""
    path: SourcePath | None = None
    """Likewise, or `s3://BUCKET/PREFIX` below a configured one: of a folder of images, of a `.tar`, `.parquet`, `.csv` or `.jsonl` file, of
    a folder of tar or Parquet shards, or a pattern of shards. Labeled and evaluation: by a folder per class in the keys, `.cls` members,
    a `label` or a `class` column."""
    format: Format = "auto"
    """What lies at `path`; `auto` goes by the ending, and takes a folder that holds nothing but shards for those."""
    split: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Which part of a list with a `split` column, or of Parquet files that are called `<split>-00000-of-00004.parquet`."""
    pack: Pack | None = None
    """Copy the images into tar shards that every worker reads from the service's storage; afterwards the source is not needed any more."""

    @model_validator(mode="after")
    def _check_one(self) -> SourceOfImages:
        if (self.folder is None) == (self.path is None):
            raise ValueError("give either folder or path")
        if self.folder is not None and (self.format not in ("auto", "folder") or self.split is not None):
            raise ValueError("format and split go with path")
        return self


def check_source(source: SourceOfImages, settings: Settings) -> dict[str, Any]:
    """The source as the version's row keeps it."""
    return _check_place(source, settings) | _check_pack(source, settings)


def _check_pack(source: SourceOfImages, settings: Settings) -> dict[str, Any]:
    if source.pack is None:
        return {}
    if settings.storage_url is not None and settings.dataset_s3_endpoint_url not in (None, settings.s3_endpoint_url):
        message = (
            f"attempts read datasets from {settings.dataset_s3_endpoint_url}; packed images would lie in {settings.storage_url} at another "
            "store, where they cannot; leave `pack` out"
        )
        raise InvalidRequest(message, pointer="/source/pack")
    return {"pack": source.pack.model_dump()}


def _check_place(source: SourceOfImages, settings: Settings) -> dict[str, Any]:
    roots = settings.roots
    pointer, text = ("/source/folder", source.folder) if source.path is None else ("/source/path", source.path)
    try:
        if source.path is None:
            return {"folder": str(rows.check_folder(str(source.folder), roots))}
        if is_address(source.path):
            address = rows.check_address(locate(source.path), settings.bucket_roots)
            return {"path": address, "format": source.format, "split": source.split}
        path = rows.check_source(source.path, roots)
        if source.format == "auto" and path.is_file():
            format_of_file(path)
        return {"path": str(path), "format": source.format, "split": source.split}
    except DataError as error:
        raise InvalidRequest(str(error), pointer=pointer) from error
    except (OSError, RuntimeError) as error:
        # A name that is too long, a folder that may not be entered, links in a circle.
        raise FolderRefused(f"{pointer.rpartition('/')[2]} {str(text)[:200]!r} cannot be opened: {error}", pointer=pointer) from error
