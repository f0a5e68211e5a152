"""Datasets over HTTP: registered below the roots, versioned, split, and read file by file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from core.db.datasets import add_version, create_dataset, finish_version
from core.db.tables import Dataset, DatasetVersion, Job
from core.settings import Settings
from ml.manifest import COLUMNS, Manifest
from server.manifest_rows import read_rows
from tests.server.builders import Api, add_ready_version, api_in_process


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path, dataset_roots=(tmp_path / "root",)) as running:
        (tmp_path / "root" / "images").mkdir(parents=True)
        yield running


def register(api: Api, folder: Path | str, *, name: str = "flowers", kind: str = "labeled") -> Any:
    return api.client.post("/api/v1/datasets", json={"name": name, "kind": kind, "source": {"folder": str(folder)}})


def add_manifest(api: Api, directory: Path, num_images: int) -> str:
    """A ready version with so many files, each third one broken."""
    base = dict.fromkeys(COLUMNS) | {"digest": "d" * 64, "class_name": "a", "bytes": 10}
    rows = [
        base | {"key": f"a/{n:05}.png", "status": "undecodable"} if n % 3 == 0 else base | {"key": f"a/{n:05}.png", "status": "ok"}
        for n in range(num_images)
    ]
    manifest = Manifest.from_rows(rows, root=directory, kind="labeled")
    manifest.write(directory / "manifest.parquet")
    facts = api.services.storage.put(directory / "manifest.parquet")
    with api.database.transaction() as session:
        version, _ = add_version(session, create_dataset(session, name="many", kind="labeled"), source={"folder": "/x"}, ingest=False)
        counts = {"num_images": num_images, "num_usable": num_images * 2 // 3, "class_names": ["a"]}
        finish_version(session, version.id, manifest=facts | counts, report={})
        return version.id


def test_registering_a_folder_starts_the_job_that_reads_it(api: Api, tmp_path: Path) -> None:
    answer = register(api, tmp_path / "root" / "images")

    job = answer.json()
    assert (answer.status_code, answer.headers["location"], answer.headers["retry-after"]) == (202, f"/api/v1/jobs/{job['id']}", "1")
    dataset = api.client.get("/api/v1/datasets/flowers").json()
    version = dataset["latest_version"]
    assert version["id"] == job["resources"]["dataset_version_id"]
    assert (version["number"], version["status"], version["job_id"]) == (1, "pending", job["id"])
    assert version["source"] == {"folder": str(tmp_path / "root" / "images")}
    assert api.client.get(f"/api/v1/datasets/{dataset['id']}").json() == dataset
    assert api.client.get(f"/api/v1/dataset-versions/{version['id']}").json() == version


@pytest.mark.parametrize("address", ["s3://pool", "s3://pool/", "s3://pool/a/shard-{000..009}.tar", "s3://other/images/x.parquet"])
def test_addresses_below_a_root_in_s3_are_registered(tmp_path: Path, address: str) -> None:
    with api_in_process(tmp_path, dataset_roots=(tmp_path, "s3://pool", "s3://other/images")) as api:
        body = {"name": "pool", "kind": "unlabeled", "source": {"path": address}}
        answer = api.client.post("/api/v1/datasets", json=body)
        source = api.client.get("/api/v1/datasets/pool").json()["latest_version"]["source"]

    assert answer.status_code == 202, answer.text
    assert source == {"path": address.rstrip("/"), "format": "auto", "split": None}


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ({"path": "s3://secret/x"}, "folder_refused", "'s3://secret/x' lies outside the configured roots (s3://pool/images)"),
        ({"path": "s3://pool/images-of-others"}, "folder_refused", "lies outside"),
        ({"path": "s3://pool"}, "folder_refused", "lies outside"),
        ({"path": "s3://pool/images/../x"}, "invalid_request", "has an empty part, `.` or `..` in it"),
        ({"path": "s3://"}, "invalid_request", "s3://BUCKET or s3://BUCKET/PREFIX would be"),
        ({"folder": "s3://pool/images"}, "folder_refused", "must be an absolute path; `path` takes addresses in S3"),
    ],
)
def test_an_address_outside_the_roots_is_refused(tmp_path: Path, source: dict[str, str], code: str, said: str) -> None:
    with api_in_process(tmp_path, dataset_roots=(tmp_path, "s3://pool/images/")) as api:
        answer = api.client.post("/api/v1/datasets", json={"name": "pool", "kind": "unlabeled", "source": source})

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code)
    assert said in problem["detail"]
    assert problem["errors"][0]["pointer"] == f"/source/{next(iter(source))}"


def test_packing_is_a_part_of_the_source_and_of_the_job(api: Api, tmp_path: Path) -> None:
    source = {"folder": str(tmp_path / "root" / "images"), "pack": {"resize_shorter_side": 256}}

    answer = api.client.post("/api/v1/datasets", json={"name": "packed", "kind": "unlabeled", "source": source})
    wrong = {"path": source["folder"], "pack": {"resize_shorter_side": 3}}
    refused = api.client.post("/api/v1/datasets", json={"name": "other", "kind": "unlabeled", "source": wrong})

    pack = {"shard_bytes": 100_000_000, "resize_shorter_side": 256}
    assert answer.status_code == 202, answer.text
    assert api.client.get("/api/v1/datasets/packed").json()["latest_version"]["source"] == source | {"pack": pack}
    with api.database.reading() as session:
        assert session.get_one(Job, answer.json()["id"]).input["pack"] == pack
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/source/pack/resize_shorter_side")


def test_packing_is_refused_where_attempts_could_not_read_the_shards(tmp_path: Path) -> None:
    stores = {"storage_url": "s3://kept", "s3_endpoint_url": "http://one:9000", "dataset_s3_endpoint_url": "http://other:9000"}
    with api_in_process(tmp_path, **stores) as api:
        body = {"name": "packed", "kind": "unlabeled", "source": {"path": str(tmp_path), "pack": {}}}
        answer = api.client.post("/api/v1/datasets", json=body)

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/source/pack")
    assert "attempts read datasets from http://other:9000" in answer.json()["detail"]


def test_roots_in_s3_stand_among_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOISY_STUDENT_DATASET_ROOTS", f"s3://pool/images/:{tmp_path}:s3://other")

    settings = Settings(data_directory=tmp_path / "data")

    assert settings.bucket_roots == ("s3://pool/images", "s3://other")
    assert settings.roots == (tmp_path, tmp_path / "data" / "datasets")


@pytest.mark.parametrize(
    "folder",
    ["relative", "/", "/etc", "{root}/missing", "{root}/../outside", "{root}/link", "{root}/file", "{root}/" + "x" * 300, "{root}/loop"],
)
def test_a_folder_outside_the_roots_or_missing_is_refused(api: Api, tmp_path: Path, folder: str) -> None:
    root = tmp_path / "root"
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("no folder")

    answer = register(api, folder.format(root=root))

    assert (answer.status_code, answer.json()["code"]) == (422, "folder_refused")
    assert answer.json()["errors"][0]["pointer"] == "/source/folder"
    with api.database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Dataset)) == 0


def test_a_zero_character_in_a_path_is_refused(api: Api) -> None:
    assert register(api, "/data\0/x").status_code == 422


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ({}, "/source"),
        ({"folder": "{root}/images", "path": "{root}/images"}, "/source"),
        ({"folder": "{root}/images", "format": "tar"}, "/source"),
        ({"folder": "{root}/images", "split": "train"}, "/source"),
        ({"path": "{root}/images", "format": "zip"}, "/source/format"),
        ({"path": "{root}/images", "split": ""}, "/source/split"),
        ({"path": "{root}/images", "compress": True}, "/source/compress"),
        ({"path": "relative.tar"}, "/source/path"),
        ({"path": "/etc/passwd"}, "/source/path"),
        ({"path": "{root}/absent.tar"}, "/source/path"),
        ({"path": "{root}/link.tar"}, "/source/path"),
        ({"path": "{root}/../x-{{0..3}}.tar"}, "/source/path"),
        ({"path": "{root}/absent/x-{{0..3}}.tar"}, "/source/path"),
        ({"path": "{root}/images.tar.gz"}, "/source/path"),
        ({"path": "{root}/notes.pdf"}, "/source/path"),
        ({"path": "{root}/" + "x" * 300 + ".tar"}, "/source/path"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_by_its_field(api: Api, tmp_path: Path, source: dict[str, Any], pointer: str) -> None:
    root = tmp_path / "root"
    (tmp_path / "outside.tar").write_bytes(b"")
    (root / "link.tar").symlink_to(tmp_path / "outside.tar")
    (root / "images.tar.gz").write_bytes(b"")
    (root / "notes.pdf").write_bytes(b"")
    given = {name: value.format(root=root) if isinstance(value, str) else value for name, value in source.items()}

    answer = api.client.post("/api/v1/datasets", json={"name": "flowers", "kind": "labeled", "source": given})

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


@pytest.mark.parametrize("name", ["x.tar", "images", "x.csv", "x-{000..009}.tar"])
def test_a_path_of_any_source_starts_the_job_that_reads_it(api: Api, tmp_path: Path, name: str) -> None:
    path = tmp_path / "root" / name
    if path.suffix and "{" not in name:
        path.write_bytes(b"")

    answer = api.client.post("/api/v1/datasets", json={"name": "flowers", "kind": "labeled", "source": {"path": str(path)}})

    assert answer.status_code == 202
    source = {"path": str(path), "format": "auto", "split": None}
    assert api.client.get("/api/v1/datasets/flowers").json()["latest_version"]["source"] == source
    with api.database.reading() as session:
        found = session.get_one(Job, answer.json()["id"]).input
    assert found == {**source, "kind": "labeled", "version_id": answer.json()["resources"]["dataset_version_id"]}


def test_a_taken_name_is_refused(api: Api, tmp_path: Path) -> None:
    register(api, tmp_path / "root" / "images")

    answer = register(api, tmp_path / "root" / "images", kind="unlabeled")

    assert (answer.status_code, answer.json()["code"]) == (409, "already_exists")
    assert answer.json()["errors"][0]["pointer"] == "/name"


def test_a_further_version_leaves_the_first_as_it_is(api: Api, tmp_path: Path) -> None:
    folder = {"source": {"folder": str(tmp_path / "root" / "images")}}
    register(api, tmp_path / "root" / "images")

    answer = api.client.post("/api/v1/datasets/flowers/versions", json=folder)

    assert answer.status_code == 202
    numbers = [version["number"] for version in api.client.get("/api/v1/datasets/flowers/versions").json()["items"]]
    assert numbers == [2, 1]
    assert api.client.get("/api/v1/dataset-versions/flowers:1").json()["number"] == 1
    assert api.client.get("/api/v1/datasets").json()["items"][0]["latest_version"]["number"] == 2


def test_datasets_are_listed_by_kind(api: Api) -> None:
    for name, kind in (("a", "labeled"), ("b", "unlabeled"), ("c", "evaluation")):
        add_ready_version(api.database, name, kind)

    assert [one["name"] for one in api.client.get("/api/v1/datasets").json()["items"]] == ["c", "b", "a"]
    assert [one["name"] for one in api.client.get("/api/v1/datasets?kind=unlabeled").json()["items"]] == ["b"]


def test_a_split_makes_a_dataset_per_part_and_one_job(api: Api) -> None:
    source = add_ready_version(api.database, "flowers", "labeled")
    shares = {"labeled": 200, "validation": 0.1, "test": 0.25, "unlabeled": "rest"}

    answer = api.client.post("/api/v1/datasets/flowers/splits", json={"shares": shares, "seed": 7, "name_prefix": "mine"})

    assert answer.status_code == 202
    parts = answer.json()["resources"]["dataset_version_ids"]
    made = {part: api.client.get(f"/api/v1/datasets/mine-{part}").json() for part in shares}
    assert {part: one["kind"] for part, one in made.items()} == {
        "labeled": "labeled",
        "validation": "evaluation",
        "test": "evaluation",
        "unlabeled": "unlabeled",
    }
    assert {part: one["latest_version"]["id"] for part, one in made.items()} == parts
    with api.database.reading() as session:
        job = session.get_one(Job, answer.json()["id"])
        assert job.input["source_version_id"] == source.id
        assert {part: target["share"] for part, target in job.input["targets"].items()} == shares
        assert job.input["seed"] == 7


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"labeled": 0},
        {"labeled": -1},
        {"labeled": 1.5},
        {"labeled": "all"},
        {"labeled": True},
        {"training": 0.5},
        {"labeled": 0.6, "test": 0.6},
        {"labeled": "rest", "test": "rest"},
    ],
)
def test_impossible_shares_are_refused(api: Api, shares: dict[str, Any]) -> None:
    add_ready_version(api.database, "flowers", "labeled")

    answer = api.client.post("/api/v1/datasets/flowers/splits", json={"shares": shares})

    assert answer.status_code == 422
    assert "/shares" in str(answer.json()["errors"]) or "share" in answer.json()["detail"] or "rest" in answer.json()["detail"]


def test_only_ready_folders_of_classes_can_be_split(api: Api, tmp_path: Path) -> None:
    add_ready_version(api.database, "pool", "unlabeled")
    register(api, tmp_path / "root" / "images")

    pool = api.client.post("/api/v1/datasets/pool/splits", json={"shares": {"labeled": 0.5}})
    pending = api.client.post("/api/v1/datasets/flowers/splits", json={"shares": {"labeled": 0.5}})

    assert (pool.status_code, pending.status_code, pending.json()["code"]) == (422, 409, "not_ready")


def test_a_split_that_cannot_be_cut_takes_no_names(api: Api) -> None:
    add_ready_version(api.database, "flowers", "labeled")
    with api.database.transaction() as session:
        session.execute(sa.update(DatasetVersion).values(report={"classes": {"rose": 24, "tulip": 300}}))

    refused = api.client.post("/api/v1/datasets/flowers/splits", json={"shares": {"labeled": 200, "unlabeled": "rest"}})
    accepted = api.client.post("/api/v1/datasets/flowers/splits", json={"shares": {"labeled": 0.5, "unlabeled": "rest"}})

    assert (refused.status_code, refused.json()["errors"][0]["pointer"], accepted.status_code) == (422, "/shares", 202)
    assert "class 'rose' has 24 different usable images, labeled 200 and unlabeled rest asks for more" in refused.json()["detail"]


def test_a_name_whose_versions_all_came_to_nothing_is_free_again(api: Api, tmp_path: Path) -> None:
    register(api, tmp_path / "root" / "images")
    taken = api.client.post("/api/v1/datasets", json={"name": "flowers", "kind": "labeled", "source": {"folder": str(tmp_path / "root")}})
    with api.database.transaction() as session:
        session.execute(sa.update(DatasetVersion).values(status="failed"))
    body = {"name": "flowers", "kind": "labeled", "source": {"folder": str(tmp_path / "root")}}

    other_kind = api.client.post("/api/v1/datasets", json={**body, "kind": "unlabeled"})
    again = api.client.post("/api/v1/datasets", json=body)

    assert [answer.status_code for answer in (taken, other_kind, again)] == [409, 409, 202]
    assert api.client.get("/api/v1/datasets/flowers").json()["latest_version"]["number"] == 2


def test_a_versions_files_are_read_in_pages(api: Api, tmp_path: Path) -> None:
    version_id = add_manifest(api, tmp_path, 25)
    seen, cursor = [], None
    while True:
        query = {"limit": "7"} | ({"cursor": cursor} if cursor else {})
        page = api.client.get(f"/api/v1/dataset-versions/{version_id}/images", params=query).json()
        seen += [image["key"] for image in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert seen == [f"a/{number:05}.png" for number in range(25)]


def test_a_versions_broken_files_are_found(api: Api, tmp_path: Path) -> None:
    version_id = add_manifest(api, tmp_path, 12)

    page = api.client.get(f"/api/v1/dataset-versions/{version_id}/images?status=undecodable").json()

    assert [image["key"] for image in page["items"]] == [f"a/{number:05}.png" for number in (0, 3, 6, 9)]
    assert {image["status"] for image in page["items"]} == {"undecodable"}


def test_the_files_of_a_version_that_is_not_ready_are_not_there_yet(api: Api, tmp_path: Path) -> None:
    version_id = register(api, tmp_path / "root" / "images").json()["resources"]["dataset_version_id"]

    answer = api.client.get(f"/api/v1/dataset-versions/{version_id}/images")

    assert (answer.status_code, answer.json()["code"]) == (409, "not_ready")


def test_presets_are_shown_complete(api: Api) -> None:
    presets = {one["name"]: one["recipe"] for one in api.client.get("/api/v1/recipes").json()["items"]}

    assert {"digits", "small-32px", "photos-224", "paper-l2"} <= set(presets)
    assert api.client.get("/api/v1/recipes/digits").json()["recipe"] == presets["digits"]
    assert api.client.get("/api/v1/recipes/nothing").status_code == 404


def test_a_broken_file_among_many_is_found_without_reading_the_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.manifest.BATCH_ROWS", 4)
    base = dict.fromkeys(COLUMNS) | {"digest": "d" * 64, "class_name": "a", "bytes": 10}
    rows = [base | {"key": f"{n:03}", "status": "empty" if n in (9, 18) else "ok"} for n in range(20)]
    Manifest.from_rows(rows, root=tmp_path, kind="labeled").write(tmp_path / "manifest")
    groups: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group, **more: groups.append(group) or plain(file, group, **more))

    first = read_rows(tmp_path / "manifest", position=0, limit=1, columns=("key",), equal={"status": "empty"})
    second = read_rows(tmp_path / "manifest", position=18, limit=1, columns=("key",), equal={"status": "empty"})

    assert (first, second) == (([{"key": "009"}], 18), ([{"key": "018"}], None))
    assert groups == [2, 4, 4]
