"""Stored files that a sweep removes while somebody asks for them: an answer that says so, and a reader who is not disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from core.db.files import forget_files, name_files
from core.db.promotions import move_alias
from core.db.pseudo_labels import finish_set
from core.db.session import Database
from core.db.tables import Job, StoredFile
from core.errors import NotFound, StorageDamaged
from core.storage import LocalStorage
from server.stored_files import StoredFiles
from tests.ml.builders_images import write_class_folders, write_flat_folder
from tests.server.builders_service import COLORS, Service, add_dataset, add_generation, running_service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(tmp_path) as running:
        add_dataset(running, "pool", "unlabeled", write_flat_folder(tmp_path / "pool", 2))
        add_dataset(running, "test", "evaluation", write_class_folders(tmp_path / "test", dict.fromkeys(COLORS, 2), first=10))
        yield running


def read_generation_file(service: Service) -> httpx.Response:
    return service.get(f"/generations/{add_generation(service)}/files/model.onnx")


def compare_two(service: Service) -> httpx.Response:
    return service.get(f"/generations/{add_generation(service)}/compare", params={"with": add_generation(service, num_correct=70)})


def promote_over_another(service: Service) -> httpx.Response:
    with service.services.database.transaction() as session:
        move_alias(session, "production", add_generation(service), expected_version=None, action="promote", actor=None)
    return service.promote(add_generation(service), etag='"v1"')


def list_images(service: Service) -> httpx.Response:
    return service.get("/dataset-versions/pool/images")


def look_for_leakage(service: Service) -> httpx.Response:
    return service.get("/dataset-versions/pool/leakage", params={"with": "test"})


def make_set(service: Service) -> str:
    return str(service.post("/pseudo-label-sets", {"generation": add_generation(service), "unlabeled": "pool"}).json()["id"])


def put_table(service: Service) -> dict[str, dict[str, object]]:
    path = service.directory / "table.parquet"
    pq.write_table(pa.table({"key": ["a.png"]}), path)
    return {name: service.services.storage.put(path) for name in ("items.parquet", "predictions.parquet", "attempt-1.log")}


def list_guesses(service: Service) -> httpx.Response:
    set_id = make_set(service)
    with service.services.database.transaction() as session:
        finish_set(session, set_id, files={"items.parquet": put_table(service)["items.parquet"]}, report={})
    return service.get(f"/pseudo-label-sets/{set_id}/items")


def read_pool_image(service: Service) -> httpx.Response:
    return service.get(f"/pseudo-label-sets/{make_set(service)}/items/10000.png/image")


def make_prediction(service: Service) -> str:
    job_id = str(service.post("/batch-predictions", {"generation": add_generation(service), "dataset": "pool"}).json()["id"])
    with service.services.database.transaction() as session:
        session.get_one(Job, job_id).status = "succeeded"
        name_files(session, job_id, put_table(service))
    return job_id


def list_predictions(service: Service) -> httpx.Response:
    return service.get(f"/batch-predictions/{make_prediction(service)}/items")


def read_log(service: Service) -> httpx.Response:
    return service.get(f"/jobs/{make_prediction(service)}/logs")


ASKS = [
    read_generation_file,
    compare_two,
    promote_over_another,
    list_images,
    look_for_leakage,
    list_guesses,
    read_pool_image,
    list_predictions,
    read_log,
]


def sweep_after_each_fetch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a deletion and a sweep do, right after the path of a file was given out."""
    storage, fetch = service.services.storage, service.services.storage.fetch

    def fetch_then_sweep(digest: str, *, verify: bool = False) -> Path:
        path = fetch(digest, verify=verify)
        with service.services.database.transaction() as session:
            session.execute(sa.delete(StoredFile).where(StoredFile.digest == digest))
        storage.remove(digest)
        return path

    monkeypatch.setattr(storage, "fetch", fetch_then_sweep)


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.__name__)
def test_what_was_swept_before_it_could_be_opened_is_not_found(
    service: Service, ask: Callable[[Service], httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_after_each_fetch(service, monkeypatch)

    answer = ask(service)

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.text


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "objects")


def store(database: Database, storage: LocalStorage, directory: Path) -> str:
    """A file that a row names; its digest."""
    path = directory / "table.parquet"
    pq.write_table(pa.table({"key": ["a.png"]}), path)
    with database.transaction() as session:
        name_files(session, "owner", {path.name: (stored := storage.put(path))})
    return str(stored["digest"])


@pytest.mark.parametrize(("is_named", "error"), [(False, NotFound), (True, StorageDamaged)], ids=["forgotten", "named"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_is_gone_is_not_found_unless_a_row_still_names_it(
    is_named: bool,
    error: type[Exception],
    when: str,
    database: Database,
    storage: LocalStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = store(database, storage, tmp_path)
    path = storage.fetch(digest)
    if not is_named:
        with database.transaction() as session:
            forget_files(session, "owner")
    storage.remove(digest)
    if when == "after":
        monkeypatch.setattr(storage, "fetch", lambda _: path)

    with pytest.raises(error):
        StoredFiles(database, storage).open(digest)


def test_a_file_that_is_swept_while_it_is_read_is_read_to_its_end(database: Database, storage: LocalStorage, tmp_path: Path) -> None:
    digest = store(database, storage, tmp_path)

    with StoredFiles(database, storage).reading(digest) as path:
        storage.remove(digest)
        rows = [pq.read_table(path, filters=[("key", "=", "a.png")], partitioning=None).to_pylist() for _ in range(2)]

    assert rows == [[{"key": "a.png"}]] * 2


def test_a_file_that_is_swept_before_it_is_sent_is_sent_whole(database: Database, storage: LocalStorage, tmp_path: Path) -> None:
    digest = store(database, storage, tmp_path)
    content = storage.fetch(digest).read_bytes()

    answer = StoredFiles(database, storage).send(digest, filename="table.parquet", headers={"ETag": '"mine"'})
    storage.remove(digest)
    sent = TestClient(answer).get("/", headers={"Range": "bytes=4-"})

    assert (sent.status_code, sent.content, sent.headers["etag"]) == (206, content[4:], '"mine"')
