"""Deleting and measuring over HTTP, and what is answered about guesses that were removed for their age."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.db.tables import Generation, PseudoLabelSet, Run, StoredFile
from core.settings import Settings
from tests.builders_histories import Histories
from tests.server.builders import Api, add_job, api_in_process, fail, start_job
from workers.garbage import collect


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


@pytest.fixture
def histories(api: Api, tmp_path: Path) -> Histories:
    return Histories(api.database, tmp_path)


def get(api: Api, path: str, status: int = 200) -> Any:
    answer = api.client.get(f"/api/v1{path}")
    assert answer.status_code == status, answer.text
    return answer.json()


def delete(api: Api, path: str) -> tuple[int, str | None]:
    answer = api.client.delete(f"/api/v1{path}")
    return answer.status_code, None if answer.status_code == 204 else answer.json()["code"]


def test_a_run_is_measured_deleted_and_then_gone(api: Api, histories: Histories) -> None:
    run_id = histories.make_run()
    use = get(api, f"/runs/{run_id}/disk-use")

    first, second = delete(api, f"/runs/{run_id}"), delete(api, f"/runs/{run_id}")

    assert (first, second) == ((204, None), (404, "not_found"))
    assert use["freed_bytes"] == use["num_bytes"] > 0
    assert {kind["kind"] for kind in use["kinds"]} == {"shards", "items", "selections", "generations", "logs"}
    assert len(use["generations"]) == 3
    assert [one["num_files"] for one in use["pseudo_label_sets"]] == [9]
    assert histories.count(Generation) == 0
    get(api, f"/runs/{run_id}/events", 404)


def test_a_run_whose_generation_answers_is_refused_with_the_alias(api: Api, histories: Histories) -> None:
    run_id = histories.make_run()
    histories.promote(histories.students(run_id)[0])

    answer = api.client.delete(f"/api/v1/runs/{run_id}")

    assert (answer.status_code, answer.json()["code"]) == (409, "still_referenced")
    assert answer.json()["details"]["referrers"] == ["alias production", "history of alias production"]
    assert histories.count(Run) == 1


def test_a_set_is_canceled_and_deleted(api: Api, histories: Histories) -> None:
    set_id = histories.start_set(histories.make_import(), histories.add_version("pool", "unlabeled").id)
    early = delete(api, f"/pseudo-label-sets/{set_id}")

    canceled = api.client.post(f"/api/v1/pseudo-label-sets/{set_id}/cancel").json()

    assert early == (409, "wrong_state")
    assert canceled["status"] == "canceled"
    assert delete(api, f"/pseudo-label-sets/{set_id}") == (204, None)


def test_datasets_versions_and_batch_predictions_are_deleted(api: Api, histories: Histories) -> None:
    version = histories.add_version("photos", "labeled")
    generation_id = histories.make_import()
    prediction = histories.start_prediction(generation_id, version.id)
    waiting = delete(api, "/dataset-versions/photos:1"), delete(api, f"/batch-predictions/{prediction}")
    histories.work()

    done = [delete(api, path) for path in (f"/batch-predictions/{prediction}", "/dataset-versions/photos:1", "/datasets/photos")]

    assert waiting == ((409, "still_referenced"), (409, "wrong_state"))
    assert done == [(204, None)] * 3
    assert histories.count(StoredFile, StoredFile.owner_id != generation_id) == 1


def test_storage_is_measured_in_all_and_by_part(api: Api, histories: Histories) -> None:
    run_id = histories.make_run()
    generation_id = histories.make_import()
    [set_id] = histories.ids(PseudoLabelSet)

    whole = get(api, "/disk-use")

    assert whole["num_files"] == len(histories.stored())
    assert [run["id"] for run in whole["runs"]] == [run_id]
    assert get(api, f"/generations/{generation_id}/disk-use")["num_files"] == 2
    assert get(api, f"/pseudo-label-sets/{set_id}/disk-use")["num_files"] == 9
    assert get(api, "/dataset-versions/data-0-unlabeled/disk-use")["num_files"] == 1


def test_what_was_removed_for_its_age_answers_410_and_how_to_make_it_again(api: Api, histories: Histories, tmp_path: Path) -> None:
    run_id = histories.make_run()
    prediction = histories.start_prediction(histories.students(run_id)[0], histories.add_version("pool", "unlabeled").id)
    histories.work()
    histories.age(days=3)
    settings = Settings(data_directory=tmp_path / "data", keep_items_days=2, keep_shards_days=2, keep_predictions_days=2)
    collect(histories.database, histories.storage, settings)
    [set_id] = histories.ids(PseudoLabelSet)

    problem = get(api, f"/pseudo-label-sets/{set_id}/items", 410)
    predicted = get(api, f"/batch-predictions/{prediction}/items", 410)
    row = get(api, f"/pseudo-label-sets/{set_id}")

    assert problem["code"] == predicted["code"] == "expired"
    assert problem["details"]["expired_at"][:16] == row["items_expired_at"][:16]
    assert row["shards_expired_at"] is not None
    assert row["report"] is not None
    get(api, f"/pseudo-label-sets/{set_id}/counts")
    for again in (problem["details"]["make_again"], predicted["details"]["make_again"]):
        answer = api.client.request(again["method"], again["path"], json=again["body"])
        assert answer.status_code == 202, answer.text


def test_a_split_one_of_whose_parts_was_deleted_is_not_tried_again(api: Api, histories: Histories) -> None:
    kept = histories.add_version("kept", "labeled").id
    targets = {"labeled": {"version_id": kept}, "test": {"version_id": "dsv_gone"}}
    job = start_job(api.database, add_job(api.database, kind="split", input={"targets": targets}).id)
    fail(api.database, job)

    answer = api.client.post(f"/api/v1/jobs/{job.id}/retry")

    assert (answer.status_code, answer.json()["code"]) == (409, "wrong_state")
    assert "dsv_gone" in answer.json()["detail"]
