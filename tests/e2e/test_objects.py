"""The same run from a folder, from tar shards, from Parquet and from S3: the same pseudo-labels, key by key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.builders_services import S3Server
from tests.e2e.processes import Place, Service, embedded
from tests.e2e.test_whole_loop import POOL, start_run, wait_for_iteration, write_folders
from tests.ml.builders_sources import write_parquet, write_tars

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]


def guesses_of(service: Service, places: Mapping[str, Place]) -> dict[str, Any]:
    """One iteration over these images: every guess with what selection made of it, and the student's bits."""
    run = start_run(service, places, iterations=1)
    iteration = wait_for_iteration(service, run["id"], 1)
    path = f"/api/v1/pseudo-label-sets/{iteration['pseudo_label_set_id']}/items"
    page = service.get(path, limit=50)
    items = page["items"]
    while page["next_cursor"]:
        page = service.get(path, limit=50, cursor=page["next_cursor"])
        items += page["items"]
    image = service.client.get(items[0]["image"])
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
    service.verify()
    kept = ("status", "class_name", "confidence", "selected", "repeat")
    return {
        "items": {item["key"]: [item[name] for name in kept] for item in items},
        "student": service.get(f"/api/v1/generations/{iteration['generation_id']}")["digest"],
        "metrics": service.get(f"/api/v1/generations/{iteration['generation_id']}")["metrics"]["test"]["top1"],
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> dict[str, Mapping[str, Place]]:
    """The same images in every layout; in S3 in a bucket of their own."""
    root = tmp_path_factory.mktemp("places")
    folders = write_folders(root / "folders")
    bucket = s3_server.directory / f"images-{uuid4().hex}"
    write_folders(bucket)
    write_tars(folders["pool"], bucket / "shards")
    addresses = {name: f"s3://{bucket.name}/{name}" for name in folders}
    return {
        "folder": folders,
        "tar": {name: str(write_tars(folder, root / "tars" / name)) for name, folder in folders.items()},
        "parquet": {name: str(write_parquet(folder, root / "hub" / name)) for name, folder in folders.items()},
        "bucket": addresses,
        "shards in a bucket": addresses | {"pool": f"s3://{bucket.name}/shards"},
        "packed into a bucket": {name: {"folder": str(folder), "pack": {"shard_bytes": 1_000_000}} for name, folder in folders.items()},
    }


def run_over(places: Mapping[str, Place], directory: Path, server: S3Server, **settings: str) -> dict[str, Any]:
    """`guesses_of` from a service of its own."""
    environment = {
        "DATASET_ROOTS": ":".join({str(directory.parent.parent), *(place for place in places.values() if str(place).startswith("s3://"))}),
        "DATASET_S3_ENDPOINT_URL": server.url,
        "DATASET_S3_ACCESS_KEY_ID": server.access_key,
        "DATASET_S3_SECRET_ACCESS_KEY": server.secret_key,
        **settings,
    }
    with embedded(directory, roots=directory, **{f"NOISY_STUDENT_{name}": value for name, value in environment.items()}) as service:
        return guesses_of(service, places)


@pytest.fixture(scope="module")
def of_folder(places: dict[str, Mapping[str, Place]], tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> dict[str, Any]:
    return run_over(places["folder"], tmp_path_factory.mktemp("of-folder"), s3_server)


@pytest.mark.parametrize("layout", ["tar", "parquet", "bucket", "shards in a bucket", "packed into a bucket"])
def test_a_run_from_anywhere_has_the_pseudo_labels_and_the_student_of_the_folders(
    places: dict[str, Mapping[str, Place]], of_folder: dict[str, Any], tmp_path: Path, s3_server: S3Server, s3_url: str, layout: str
) -> None:
    stored = {"STORAGE_URL": s3_url, "S3_ENDPOINT_URL": s3_server.url} if layout.startswith("packed") else {}

    found = run_over(places[layout], tmp_path, s3_server, **stored)

    assert len(found["items"]) == POOL
    assert any(selected for *_, selected, _ in found["items"].values())
    assert found == of_folder
