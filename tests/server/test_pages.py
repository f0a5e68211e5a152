"""Pages neither repeat nor skip, whatever is added meanwhile, and cursors cannot be made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.builders import Api, add_job, add_worker, api_in_process


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with api_in_process(tmp_path) as running:
        yield running


def test_pages_are_stable_while_rows_are_added(api: Api) -> None:
    expected = [add_job(api.database).id for _ in range(10)][::-1]
    seen: list[str] = []
    cursor: str | None = ""

    while cursor is not None:
        page = api.client.get(f"/api/v1/jobs?limit=3&cursor={cursor}" if cursor else "/api/v1/jobs?limit=3").json()
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        add_job(api.database)

    assert seen == expected


def test_filters_hold_on_every_page(api: Api) -> None:
    wanted = {add_job(api.database, kind=kind).id for kind in ("import", "predict") * 3}
    page = api.client.get("/api/v1/jobs?kind=predict&limit=2").json()
    rest = api.client.get(f"/api/v1/jobs?kind=predict&limit=2&cursor={page['next_cursor']}").json()

    items = page["items"] + rest["items"]

    assert {job["kind"] for job in items} == {"predict"}
    assert len({job["id"] for job in items} & wanted) == 3
    assert rest["next_cursor"] is None


def test_an_altered_cursor_is_refused(api: Api) -> None:
    for _ in range(3):
        add_job(api.database)
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]
    altered = ("B" if cursor[0] == "A" else "A") + cursor[1:]

    answers = [api.client.get("/api/v1/jobs", params={"cursor": one}) for one in (altered, "x", "ä", "AAAA", cursor[:-2])]

    assert [answer.status_code for answer in answers] == [422] * 5
    assert answers[0].json()["errors"][0]["parameter"] == "cursor"


def test_a_cursor_is_good_for_its_own_list_and_filters_only(api: Api) -> None:
    for number in range(3):
        add_job(api.database)
        add_worker(api.database, f"worker-{number}")
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]

    assert api.client.get(f"/api/v1/jobs?status=queued&cursor={cursor}").status_code == 422
    assert api.client.get(f"/api/v1/workers?cursor={cursor}").status_code == 422


def test_replicas_read_each_others_cursors(api: Api, tmp_path: Path) -> None:
    for _ in range(3):
        add_job(api.database)
    cursor = api.client.get("/api/v1/jobs?limit=1").json()["next_cursor"]

    with api_in_process(tmp_path) as other:
        assert len(other.client.get(f"/api/v1/jobs?cursor={cursor}").json()["items"]) == 2
