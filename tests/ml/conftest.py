"""Images in a store that speaks like S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ml import objects
from tests.builders_services import S3Server
from tests.ml import builders_images as images
from tests.ml import builders_sources as builders
from tests.ml.builders_objects import access_to

IMAGES = {"cat": 7, "dog": 6}


@pytest.fixture(scope="module")
def stored(s3_server: S3Server) -> dict[str, str]:
    """Class folders with a broken file, in every layout, as addresses; and the folder itself."""
    name = f"images-{uuid4().hex}"
    s3_server.make_bucket(name)
    bucket = s3_server.directory / name
    folder = images.write_class_folders(bucket / "folder", IMAGES)
    (folder / "cat" / "cut.jpg").write_bytes(images.truncated_jpeg())
    (folder / "dog" / "notes.txt").write_bytes(b"hello")
    places = builders.write_layouts(folder, bucket)
    addresses = {layout: f"s3://{name}/{path.relative_to(bucket).as_posix()}" for layout, path in places.items()}
    return addresses | {"here": str(folder)}


@pytest.fixture
def reads_objects(s3_server: S3Server, s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, and those that it starts, may read the tests' store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    # A client keeps the credentials that it found: those of another test, or that there were none.
    monkeypatch.setattr(objects, "_clients", {})
    objects.use(access_to(s3_server))
    yield
    objects.use(objects.Access())


@pytest.fixture
def bucket(s3_server: S3Server) -> Path:
    """The files of an empty bucket of this test's own."""
    name = f"own-{uuid4().hex}"
    s3_server.make_bucket(name)
    return s3_server.directory / name


@pytest.fixture
def asked(reads_objects: None, s3_server: S3Server) -> Iterator[list[str]]:
    """What this process asks objects for: a range of bytes, or nothing for all of them."""
    ranges: list[str] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        ranges.append(params["headers"].get("Range", ""))

    events = objects._client(access_to(s3_server)).meta.events
    events.register("before-call.s3.GetObject", note)
    yield ranges
    events.unregister("before-call.s3.GetObject", note)
