"""Every way out that is not a success is problem+json, with a code for programs and a pointer to what is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.builders_services import S3Server
from tests.server.builders import Api, api_in_process

FOLDER = {"folder": "/data/flowers"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api_in_process(tmp_path_factory.mktemp("problems"), body_max_bytes=20_000) as running:
        yield running


def post(api: Api, body: str | bytes, **headers: str) -> Any:
    return api.client.post("/api/v1/datasets", content=body, headers={"Content-Type": "application/json"} | headers)


def assert_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["type"] == f"/problems/{code}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["title"]
    assert body["detail"]
    return body


def test_an_unknown_route_is_a_problem(api: Api) -> None:
    assert_problem(api.client.get("/nothing"), 404, "no_such_route")


def test_a_wrong_method_is_a_problem_that_says_which_are_right(api: Api) -> None:
    answer = api.client.delete("/api/v1/recipes")

    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


def test_an_unknown_row_is_a_problem(api: Api) -> None:
    assert_problem(api.client.get("/api/v1/jobs/job_unknown"), 404, "not_found")


def test_an_id_of_another_kind_is_told_as_such(api: Api) -> None:
    problem = assert_problem(api.client.get("/api/v1/jobs/run_01m8gh3cta6sgr16a2qzcxcj10"), 404, "not_found")

    assert problem["detail"] == "there is no job 'run_01m8gh3cta6sgr16a2qzcxcj10': that is the id of a run"


@pytest.mark.parametrize(
    ("path", "parameter", "hint"),
    [
        ("/api/v1/jobs?stauts=queued", "stauts", "did you mean status?"),
        ("/api/v1/runs?kind=train", "kind", "known: cursor, limit, status"),
        ("/api/v1/recipes/digits?x=1", "x", "this route has none"),
    ],
)
def test_an_unknown_query_parameter_is_refused_not_ignored(api: Api, path: str, parameter: str, hint: str) -> None:
    problem = assert_problem(api.client.get(path), 422, "invalid_request")

    assert problem["errors"] == [{"parameter": parameter, "in": "query", "message": problem["detail"]}]
    assert problem["detail"] == f"there is no query parameter {parameter!r}; {hint}"


def test_an_unexpected_error_is_a_problem_that_tells_nothing(tmp_path: Path) -> None:
    with api_in_process(tmp_path) as api:

        def fail() -> None:
            raise RuntimeError("the password is swordfish")

        api.app.add_api_route("/fail", fail)
        answer = api.client.get("/fail")

        assert_problem(answer, 500, "internal_error")
        assert "swordfish" not in answer.text
        assert api.client.get("/livez").status_code == 200


def replace_by_a_folder(database: Path) -> None:
    """Whoever follows aliases in the background may open the file anew at any moment, which makes it again."""
    while not database.is_dir():
        for path in database.parent.glob(f"{database.name}*"):
            path.unlink(missing_ok=True)
        with suppress(FileExistsError):
            database.mkdir()


def test_a_database_that_is_away_is_a_503_that_says_when_to_come_back(tmp_path: Path) -> None:
    with api_in_process(tmp_path) as api:
        api.database.close()
        replace_by_a_folder(tmp_path / "data" / "noisy-student.sqlite3")

        answer = api.client.get("/api/v1/jobs")

        assert_problem(answer, 503, "database_unavailable")
        assert int(answer.headers["retry-after"]) > 0
        assert api.client.get("/readyz").status_code == 503
        assert api.client.get("/livez").status_code == 200


def test_readyz_names_a_bucket_that_is_away_or_missing_within_seconds(tmp_path: Path, s3_server: S3Server, s3_credentials: None) -> None:
    places = {"http://127.0.0.1:1": "does not answer", s3_server.url: "there is no bucket nowhere"}
    for number, (endpoint, problem) in enumerate(places.items()):
        with api_in_process(tmp_path / str(number), storage_url="s3://nowhere/kept", s3_endpoint_url=endpoint) as api:
            # The first answer also loads boto3.
            api.client.get("/readyz")
            started = time.monotonic()
            answer = api.client.get("/readyz")

            assert time.monotonic() - started < 5
            assert answer.status_code == 503
            assert problem in answer.json()["checks"]["storage"]
            assert answer.json()["checks"]["database"] == "ok"


def test_an_unknown_field_is_pointed_at(api: Api) -> None:
    answer = api.client.post("/api/v1/datasets", json={"name": "a", "kind": "labeled", "source": FOLDER | {"colour": "red"}})

    body = assert_problem(answer, 422, "invalid_request")
    assert body["errors"][0]["pointer"] == "/source/colour"


@pytest.mark.parametrize(
    ("field", "value"), [("name", "a b"), ("name", "ds_x"), ("name", ""), ("name", 3), ("kind", "photos"), ("source", []), ("source", None)]
)
def test_a_wrong_value_is_pointed_at(api: Api, field: str, value: Any) -> None:
    answer = api.client.post("/api/v1/datasets", json={"name": "a", "kind": "labeled", "source": FOLDER} | {field: value})

    body = assert_problem(answer, 422, "invalid_request")
    assert body["errors"][0]["pointer"] == f"/{field}"


def test_a_wrong_query_parameter_is_named(api: Api) -> None:
    body = assert_problem(api.client.get("/api/v1/jobs?limit=0"), 422, "invalid_request")

    assert (body["errors"][0]["parameter"], body["errors"][0]["in"]) == ("limit", "query")


def test_a_duplicate_key_is_refused_and_pointed_at(api: Api) -> None:
    body = assert_problem(post(api, '{"name": "a", "name": "b", "kind": "labeled"}'), 422, "invalid_request")

    assert body["errors"][0]["pointer"] == "/name"


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "[" * 5000 + "]" * 5000, "9" * 5000],
    ids=["nan", "infinity", "minus-infinity", "overflow", "surrogate", "deep", "long"],
)
def test_json_that_cannot_be_kept_is_refused(api: Api, value: str) -> None:
    assert_problem(post(api, f'{{"name": {value}, "kind": "labeled", "source": {{"folder": "/data"}}}}'), 422, "invalid_request")


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b"null", b"", b'"text"'])
def test_a_body_that_is_no_object_is_refused(api: Api, body: bytes) -> None:
    assert_problem(post(api, body), 422, "invalid_request")


def test_another_content_type_is_refused(api: Api) -> None:
    assert_problem(post(api, b"name=a", **{"Content-Type": "application/x-www-form-urlencoded"}), 415, "unsupported_media")


def test_a_body_that_is_declared_too_large_is_refused(api: Api) -> None:
    assert_problem(post(api, b" " * 20_001), 413, "payload_too_large")


def test_a_body_that_streams_too_much_is_refused(api: Api) -> None:
    answer = api.client.post("/api/v1/datasets", content=(b" " * 1000 for _ in range(30)), headers={"Content-Type": "application/json"})

    assert_problem(answer, 413, "payload_too_large")


@pytest.mark.parametrize("code", ["leakage", "gate_refused", "not_found"])
def test_the_type_of_a_problem_leads_to_its_meaning(api: Api, code: str) -> None:
    assert api.client.get(f"/problems/{code}").json()["meaning"]
