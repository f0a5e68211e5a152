"""One Idempotency-Key, one effect, one answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from core.db.tables import Dataset, Job
from tests.server.builders import Api, api_in_process


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    (tmp_path / "images").mkdir()
    with api_in_process(tmp_path) as running:
        yield running


def register(api: Api, tmp_path: Path, key: str | None, *, name: str = "flowers") -> Any:
    body = {"name": name, "kind": "unlabeled", "source": {"folder": str(tmp_path / "images")}}
    return api.client.post("/api/v1/datasets", json=body, headers={} if key is None else {"Idempotency-Key": key})


def count(api: Api, table: type[Any]) -> int:
    with api.database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_the_same_request_again_gets_the_first_answer(api: Api, tmp_path: Path) -> None:
    first, second = register(api, tmp_path, "k"), register(api, tmp_path, "k")

    assert (first.status_code, second.status_code) == (202, 202)
    assert second.json() == first.json()
    assert second.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert (count(api, Dataset), count(api, Job)) == (1, 1)


def test_another_body_with_the_same_key_is_refused(api: Api, tmp_path: Path) -> None:
    register(api, tmp_path, "k")

    answer = register(api, tmp_path, "k", name="trees")

    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_mismatch")
    assert count(api, Dataset) == 1


def test_a_refused_request_leaves_its_key_free(api: Api, tmp_path: Path) -> None:
    register(api, tmp_path, "first")
    refused = register(api, tmp_path, "k")

    answer = register(api, tmp_path, "k", name="trees")

    assert (refused.status_code, answer.status_code) == (409, 202)


def test_ten_at_once_have_one_effect(api: Api, tmp_path: Path) -> None:
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: register(api, tmp_path, "k"), range(10)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert (count(api, Dataset), count(api, Job)) == (1, 1)


def test_two_keys_of_the_service_do_not_share_idempotency_keys(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with api_in_process(tmp_path, require_keys=True) as api:
        body = {"name": "flowers", "kind": "unlabeled", "source": {"folder": str(tmp_path / "images")}}
        answers = [
            api.client.post("/api/v1/datasets", json=body, headers=api.key("datasets:write") | {"Idempotency-Key": "k"}) for _ in range(2)
        ]

        assert [answer.status_code for answer in answers] == [202, 409]
        assert answers[1].json()["code"] == "already_exists"


@pytest.mark.parametrize("key", ["", "x" * 201])
def test_a_key_of_impossible_length_is_refused(api: Api, tmp_path: Path, key: str) -> None:
    answer = register(api, tmp_path, key)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["in"] == "header"
