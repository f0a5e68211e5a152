"""Images in S3 that changed, went away or cannot be read: a row with its status where it is one image, else a refusal in words."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ml import objects, pseudo_labels
from ml.errors import BadImage, DataError, NoImages, StoreAway, StoreRefused
from ml.ingestion import scan
from ml.locations import forget, read_bytes
from ml.prediction import label
from ml.sources import open_source
from tests.builders_services import S3Server, running_s3
from tests.ml import builders_images as images
from tests.ml import builders_sources as builders
from tests.ml.builders_generations import build_generation
from tests.ml.builders_objects import access_to, address_of, settle, training_batches
from tests.ml.test_layouts import build_task
from tests.ml.test_sources import left_out

IMAGES = {"cat": 7, "dog": 6}

pytestmark = pytest.mark.usefixtures("reads_objects")


def test_an_object_that_changed_or_has_gone_is_a_row_with_its_status(bucket: Path, s3_server: S3Server, tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    for number in range(4):
        images.write_image(bucket / "pool" / f"{number}.png", number)
    task = build_task(tmp_path, settle(bucket / "pool", s3_server))
    same_length = bytearray((bucket / "pool" / "1.png").read_bytes())
    same_length[50] ^= 1
    (bucket / "pool" / "1.png").write_bytes(bytes(same_length))
    (bucket / "pool" / "2.png").write_bytes(b"short")
    (bucket / "pool" / "3.png").unlink()
    settle(bucket / "pool", s3_server)

    label(task)

    assert pseudo_labels.read_shard(tmp_path / "shard.parquet")["status"].to_pylist() == ["ok", "changed", "changed", "missing"]


@pytest.mark.parametrize("loaders", [0, 1])
def test_training_names_the_object_that_has_gone(bucket: Path, s3_server: S3Server, loaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.data._WORTH_A_WORKER_SECONDS", 0)
    images.write_class_folders(bucket / "labeled", {"cat": 3, "dog": 3})
    address = settle(bucket / "labeled", s3_server)
    with training_batches(address, small=False, loaders=loaders) as batches:
        victim = next((bucket / "labeled" / "cat").iterdir())
        victim.unlink()
        settle(bucket / "labeled", s3_server)

        with pytest.raises(BadImage, match=rf"{address}/cat/{victim.name}.*cannot be read: there is no such object") as caught:
            list(batches)

    assert caught.value.status == "missing"


def test_shards_that_changed_have_rows_that_say_so(bucket: Path, s3_server: S3Server, tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    folder = images.write_class_folders(tmp_path / "folder", IMAGES)
    tars, tables = builders.write_tars(folder, bucket / "tars"), builders.write_parquet(folder, bucket / "tables")
    settle(bucket, s3_server)
    of_tars = build_task(tmp_path, address_of(tars, s3_server), output=str(tmp_path / "tars.parquet"))
    shutil.copyfile(of_tars.unlabeled, tmp_path / "of-tars")
    of_tables = build_task(tmp_path, address_of(tables, s3_server), output=str(tmp_path / "tables.parquet"))
    (tars / "shard-001.tar").unlink()
    data = (tars / "shard-002.tar").read_bytes()
    (tars / "shard-002.tar").write_bytes(data.replace(b"IHDR", b"ihdr"))
    # Another file of rows under the name: fewer, and not these.
    builders.write_parquet(images.write_class_folders(tmp_path / "other", {"cat": 2}, first=500), tmp_path / "new", files=1)
    shutil.copyfile(tmp_path / "new" / "train-00000-of-00001.parquet", tables / "train-00001-of-00002.parquet")
    settle(bucket, s3_server)

    # As a process that has not read it yet.
    forget(f"{address_of(tables, s3_server)}/train-00001-of-00002.parquet")

    found = [label(replace(of_tars, unlabeled=str(tmp_path / "of-tars")))["statuses"], label(of_tables)["statuses"]]

    assert found == [{"ok": 5, "missing": 4, "changed": 4}, {"ok": 7, "changed": 6}]


def test_a_table_that_was_replaced_is_opened_anew(bucket: Path, s3_server: S3Server, tmp_path: Path) -> None:
    folder = images.write_class_folders(tmp_path / "folder", {"cat": 3})
    builders.write_parquet(folder, bucket, files=1)
    [name] = [path.name for path in bucket.iterdir()]
    address = f"{settle(bucket, s3_server)}/{name}"
    old = scan(address, kind="unlabeled")[0].locations()
    assert read_bytes(old[0])
    images.write_class_folders(tmp_path / "folder", {"cat": 5}, first=100)
    builders.write_parquet(tmp_path / "folder", tmp_path / "new", files=1)
    shutil.copyfile(tmp_path / "new" / name, bucket / name)
    settle(bucket, s3_server)

    new = scan(address, kind="unlabeled")[0].locations()

    assert len([read_bytes(location) for location in new]) == len(new) > len(old)


def test_wrong_credentials_are_named(stored: dict[str, str], s3_server: S3Server) -> None:
    objects.use(access_to(s3_server, access_key_id="nobody"))
    with pytest.raises(StoreRefused, match=r"refuses the credentials.*correct the access key"):
        scan(stored["folder"], kind="unlabeled")
    objects.use(access_to(s3_server, secret_access_key="wrong"))
    with pytest.raises(StoreRefused, match=r"refuses the credentials|refuses this key"):
        scan(stored["tar"], kind="unlabeled")


def test_missing_credentials_are_named(stored: dict[str, str], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    objects.use(objects.Access(endpoint_url=s3_server.url))

    with pytest.raises(StoreRefused, match=r"there are no credentials; set AWS_ACCESS_KEY_ID"):
        scan(stored["folder"], kind="unlabeled")


def test_a_missing_bucket_is_named() -> None:
    for place in ("s3://nowhere/pool", "s3://nowhere/pool/x.tar", "s3://nowhere", "s3://nowhere/shard-{0..3}.tar"):
        with pytest.raises(StoreRefused, match=r"there is no bucket 'nowhere'; correct its name"):
            scan(place, kind="unlabeled")


def test_what_is_not_there_is_named(stored: dict[str, str]) -> None:
    root = stored["folder"].rpartition("/")[0]

    with pytest.raises(NoImages, match=rf"{root}/none: no object has this name or lies below it"):
        scan(f"{root}/none", kind="unlabeled")
    with pytest.raises(NoImages, match=r"1 of 4 objects are not there, for example shard-003.tar"):
        scan(f"{stored['tar']}/shard-{{000..003}}.tar", kind="unlabeled")
    with pytest.raises(NoImages, match=r"no \.tar object lies below"):
        scan(stored["folder"], kind="unlabeled", source_format="tar")


@pytest.mark.parametrize("address", ["s3://", "s3://b", "s3:///x", "s3://bucket//x", "s3://bucket/a/../b", "s3://bucket/./x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(DataError, match=r"is no address of objects|has an empty part"):
        open_source(address)


def test_a_store_that_is_away_costs_no_row_its_image(stored: dict[str, str], tmp_path: Path, s3_server: S3Server) -> None:
    build_generation(tmp_path / "generation")
    with running_s3() as server:
        shutil.copytree(stored["here"], server.directory / "own" / "pool")
        objects.use(access_to(server, attempts=1))
        task = build_task(tmp_path, "s3://own/pool")
        server.stop()

        with pytest.raises(StoreAway, match=r"s3://own/pool/cat/.*cannot be read now"):
            label(task)
        assert not Path(task.output).exists()
        server.start()
        summary = label(task)

    assert summary["statuses"] == {"ok": 13, "undecodable": 1, "unsupported": 1}


def test_a_tar_that_is_cut_short_or_holds_oddities_says_so(bucket: Path, s3_server: S3Server) -> None:
    members = {f"{number}.png": images.image_bytes(number) for number in range(4)}
    whole = builders.write_tar(bucket / "whole.tar", members).read_bytes()
    (bucket / "cut.tar").write_bytes(whole[:6000])
    (bucket / "no.tar").write_bytes(b"no tar at all" * 1000)
    (bucket / "odd").mkdir()
    with tarfile.open(bucket / "odd" / "x.tar", "w") as tar:
        builders.add_member(tar, "a.png", images.image_bytes(1))
        builders.add_member(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        builders.add_member(tar, "/absolute.png", images.image_bytes(2))
        builders.add_member(tar, "../out.png", images.image_bytes(3))
        builders.add_member(tar, "inner.tar", whole)
    root = settle(bucket, s3_server)

    with pytest.raises(DataError, match=r"cut.tar is cut short or damaged at byte .*; the last whole member is [01].png"):
        scan(f"{root}/cut.tar", kind="unlabeled")
    with pytest.raises(DataError, match=r"no.tar is no tar file"):
        scan(f"{root}/no.tar", kind="unlabeled")
    manifest, report = scan(f"{root}/odd", kind="unlabeled")

    assert dict(zip(manifest.column("key"), manifest.column("status"), strict=True)) == {"a.png": "ok", "inner.tar": "unsupported"}
    assert left_out(report) == {
        "they are links": ["link.png"],
        "their names are absolute paths": ["/absolute.png"],
        "their names lead out by `..`": ["../out.png"],
    }


def test_a_table_with_other_columns_says_which(bucket: Path, s3_server: S3Server) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["a"], "label": [1]}), bucket / "x.parquet")
    (bucket / "damaged.parquet").write_bytes((bucket / "x.parquet").read_bytes()[:-6])

    root = settle(bucket, s3_server)

    with pytest.raises(DataError, match=r"no column holds images among url .*label"):
        scan(f"{root}/x.parquet", kind="unlabeled")
    with pytest.raises(DataError, match=r"damaged.parquet is no whole Parquet file"):
        scan(f"{root}/damaged.parquet", kind="unlabeled")


def test_a_list_names_what_is_not_there_as_missing(bucket: Path, s3_server: S3Server) -> None:
    images.write_image(bucket / "in" / "a.png", 1)
    (bucket / "in" / "list.csv").write_text("path\na.png\nnone.png\n")

    manifest, _ = scan(f"{settle(bucket, s3_server)}/in/list.csv", kind="unlabeled")

    assert manifest.column("status") == ["ok", "missing"]
