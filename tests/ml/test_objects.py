"""Images in S3 are read where they lie: the same keys, bits and labels as from a folder, and what is wrong is said in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ml import decoding, objects, pseudo_labels
from ml.__main__ import main
from ml.config import ImageConfig
from ml.errors import BadImage, StoreRefused
from ml.ingestion import ingest, scan
from ml.locations import read_bytes
from ml.manifest import Manifest
from ml.prediction import label
from ml.read_ahead import read_many, take
from ml.sources import open_source
from ml.sources.listing import Notes
from tests.builders_services import S3Server
from tests.ml import builders_sources as builders
from tests.ml.builders_generations import build_generation
from tests.ml.builders_objects import access_to, settle, training_batches
from tests.ml.builders_sources import LAYOUTS
from tests.ml.test_layouts import build_task

pytestmark = pytest.mark.usefixtures("reads_objects")


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_a_bucket_has_the_manifest_and_report_of_the_folder(stored: dict[str, str], layout: str, kind: Any) -> None:
    expected, told = scan(stored["here"], kind=kind)

    manifest, report = scan(stored[layout], kind=kind)

    assert manifest.column("key") == expected.column("key")
    assert manifest.digest() == expected.digest()
    assert report == told
    assert report["statuses"] == {"ok": 13, "undecodable": 1, "unsupported": 1}
    assert manifest.root.startswith("s3://")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_read_back_from_where_it_lies(stored: dict[str, str], layout: str, tmp_path: Path) -> None:
    ingest(stored[layout], tmp_path / "manifest.parquet", kind="labeled")

    manifest = Manifest.read(tmp_path / "manifest.parquet")
    expected = [(Path(stored["here"]) / key).read_bytes() for key in manifest.column("key")]

    assert [read_bytes(location) for location in manifest.locations()] == expected
    assert [take(outcome) for outcome in read_many(manifest.locations())] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.parquet"]


def test_shards_are_found_below_a_prefix_by_pattern_and_alone(stored: dict[str, str]) -> None:
    whole = stored["tar"]
    found = {
        place: [entry.key for entry in open_source(place).entries("unlabeled", Notes())]
        for place in (whole, f"{whole}/", f"{whole}/shard-{{000..002}}.tar", f"{whole}/shard-001.tar")
    }

    assert found[whole] == found[f"{whole}/"] == found[f"{whole}/shard-{{000..002}}.tar"]
    assert len(found[whole]) == 3 * len(found[f"{whole}/shard-001.tar"]) == 15


def test_pseudo_labels_are_those_of_the_folder_key_by_key(stored: dict[str, str], tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    label(build_task(tmp_path, stored["here"], output=str(tmp_path / "here.parquet")))
    expected = pseudo_labels.read_shard(tmp_path / "here.parquet")

    for layout in LAYOUTS:
        summary = label(build_task(tmp_path, stored[layout], output=str(tmp_path / f"{layout}.parquet")))

        assert not summary["skipped"]
        assert pseudo_labels.read_shard(tmp_path / f"{layout}.parquet").equals(expected), layout
        # A shard that was labeled from the folder counts as done.
        assert label(build_task(tmp_path, stored[layout], output=str(tmp_path / "here.parquet")))["skipped"]
    assert expected["status"].to_pylist().count("ok") == 13


def test_a_decoding_process_reads_objects_too(stored: dict[str, str]) -> None:
    preprocessing = decoding.Preprocessing.from_config(ImageConfig(size=16, small_images=True))
    decoders = decoding.Decoders(1)

    found = [decoders.weak_views(scan(stored[place], kind="unlabeled")[0].locations(), preprocessing) for place in ("here", "tar")]
    decoders.close()

    assert found[0].statuses == found[1].statuses
    assert np.array_equal(found[0].images, found[1].images)


@pytest.mark.parametrize(("small", "loaders"), [(True, 0), (False, 0), (False, 1)])
def test_training_sees_the_same_bits(stored: dict[str, str], small: bool, loaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml.data._WORTH_A_WORKER_SECONDS", 0)
    seen = {}
    for layout in ("here", "folder", "tar", "parquet") if not loaders else ("here", "tar"):
        with training_batches(stored[layout], small=small, loaders=loaders) as batches:
            seen[layout] = [(batch.images.clone(), batch.labels_B.clone()) for batch in batches]

    for layout, found in seen.items():
        for (images_A, labels_A), (images_B, labels_B) in zip(found, seen["here"], strict=True):
            assert torch.equal(images_A, images_B), layout
            assert torch.equal(labels_A, labels_B), layout


def test_neighbors_in_a_tar_come_by_one_request(stored: dict[str, str], asked: list[str]) -> None:
    shard = f"{stored['tar']}/shard-001.tar"
    locations = scan(shard, kind="unlabeled")[0].locations()
    locations.sort(key=lambda location: location.offset or 0)
    asked.clear()

    outcomes = list(read_many(locations))

    assert len(outcomes) == 5
    assert not any(isinstance(outcome, BadImage) for outcome in outcomes)
    assert len(asked) == 1


def test_a_shard_of_many_members_is_listed_by_few_requests(bucket: Path, s3_server: S3Server, asked: list[str]) -> None:
    builders.write_tar(bucket / "x.tar", {f"{number:04d}.png": bytes(2000) for number in range(3000)})
    address = settle(bucket, s3_server)

    entries = list(open_source(f"{address}/x.tar").entries("unlabeled", Notes()))

    assert len(entries) == 3000
    assert len(asked) <= 12


def test_a_person_labels_and_evaluates_from_a_bucket_without_the_service(stored: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    generation = build_generation(tmp_path / "generation", class_names=("cat", "dog"))

    codes = [
        main(["--json", "label", str(generation), "--unlabeled", stored["tar"], "--out", str(tmp_path / "out")]),
        main(["--json", "evaluate", str(generation), "--images", stored["parquet"]]),
        main(["--json", "label", str(generation), "--unlabeled", "s3://nowhere/pool", "--out", str(tmp_path / "none")]),
    ]

    told = capsys.readouterr()
    assert codes == [0, 0, 1]
    assert '"ok": 13' in told.out
    assert "refused: s3://nowhere cannot be read: there is no bucket 'nowhere'" in told.err


def test_what_another_thread_asks_for_meanwhile_changes_no_request(
    stored: dict[str, str], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one waits for the modules of botocore and another one calls `use`."""
    address = scan(stored["folder"], kind="unlabeled")[0].locations()[0].path
    make = objects._make_client

    def make_slowly(access: objects.Access) -> Any:
        objects.use(access_to(s3_server, secret_access_key="wrong"))
        return make(access)

    monkeypatch.setattr(objects, "_make_client", make_slowly)
    monkeypatch.setattr(objects, "_clients", {})

    found = objects.read(address)
    with pytest.raises(StoreRefused, match="refuses"):
        objects.read(address)
    objects.use(access_to(s3_server))

    assert objects.read(address) == found
