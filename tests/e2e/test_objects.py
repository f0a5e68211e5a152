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

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]


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


def test_a_run_from_shards_tables_and_a_bucket_has_the_pseudo_labels_and_the_student_of_the_folders(
    tmp_path: Path, s3_server: S3Server, s3_url: str
) -> None:
    folders = write_folders(tmp_path / "images")
    bucket = s3_server.directory / f"images-{uuid4().hex}"
    write_folders(bucket)
    write_tars(folders["pool"], bucket / "shards")
    places: dict[str, Mapping[str, Place]] = {
        "folder": folders,
        "tar": {name: str(write_tars(folder, tmp_path / "images" / "tars" / name)) for name, folder in folders.items()},
        "parquet": {name: str(write_parquet(folder, tmp_path / "images" / "hub" / name)) for name, folder in folders.items()},
        "bucket": {name: f"s3://{bucket.name}/{name}" for name in folders},
        "shards in a bucket": {name: f"s3://{bucket.name}/{name}" for name in folders} | {"pool": f"s3://{bucket.name}/shards"},
        "packed into a bucket": {name: {"folder": str(folder), "pack": {"shard_bytes": 1_000_000}} for name, folder in folders.items()},
    }
    settings = {
        "DATASET_ROOTS": f"{tmp_path / 'images'}:s3://{bucket.name}",
        "DATASET_S3_ENDPOINT_URL": s3_server.url,
        "DATASET_S3_ACCESS_KEY_ID": s3_server.access_key,
        "DATASET_S3_SECRET_ACCESS_KEY": s3_server.secret_key,
    }
    found = {}
    for layout, named in places.items():
        directory = tmp_path / layout.replace(" ", "-")
        directory.mkdir()
        stored = {"STORAGE_URL": s3_url, "S3_ENDPOINT_URL": s3_server.url} if layout.startswith("packed") else {}
        environment = {f"NOISY_STUDENT_{name}": value for name, value in (settings | stored).items()}
        with embedded(directory, roots=tmp_path, **environment) as service:
            found[layout] = guesses_of(service, named)

    assert len(found["folder"]["items"]) == POOL
    assert any(selected for *_, selected, _ in found["folder"]["items"].values())
    for layout, guesses in found.items():
        assert guesses == found["folder"], layout
