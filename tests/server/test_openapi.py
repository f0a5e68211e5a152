"""The OpenAPI document is one that a person can administer from and a generator accepts; its page needs no internet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from server.docs import ASSETS, WEB
from tests.server.builders import Api, api_in_process


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api_in_process(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    answer: dict[str, Any] = api.client.get("/openapi.json").json()
    return answer


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{method.upper()} {path}", one) for path, of_path in document["paths"].items() for method, one in of_path.items()]


def test_every_operation_has_a_summary_a_description_and_a_known_tag(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}

    poor = [name for name, one in operations(document) if not (one.get("summary") and one.get("description") and one.get("tags"))]

    assert poor == []
    assert {tag for _, one in operations(document) for tag in one["tags"]} == tags


def test_operation_ids_are_function_names_and_unique(document: dict[str, Any]) -> None:
    ids = [one["operationId"] for _, one in operations(document)]

    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", one) for one in ids)


def test_every_operation_takes_one_content_type_at_most(document: dict[str, Any]) -> None:
    several = [name for name, one in operations(document) if len(one.get("requestBody", {}).get("content", {"": None})) != 1]

    assert several == []


def test_every_json_body_has_an_example(document: dict[str, Any]) -> None:
    without = []
    for name, one in operations(document):
        for content in one.get("requestBody", {}).get("content", {}).values():
            schema = content.get("schema", {})
            target = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], schema)
            if not ({"example", "examples"} & (set(content) | set(target)) or schema.get("format") == "binary"):
                without.append(name)

    assert [name for name in without if "/predict" not in name] == []


def test_every_guarded_operation_declares_its_scope_and_its_problems(document: dict[str, Any]) -> None:
    for name, one in operations(document):
        if name.split()[1].startswith(("/api/", "/predict")):
            assert one["security"] == [{"key": []}], name
            assert "Needs the scope" in one["description"], name
            assert {"401", "403", "422", "500", "503"} <= set(one["responses"]), name
        for status, response in one["responses"].items():
            if int(status) >= 400 and name.split()[1] != "/readyz":
                assert list(response["content"]) == ["application/problem+json"], (name, status)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = re.findall(r"'\$ref': '#/components/schemas/([^']+)'", str(document))

    assert set(found) <= set(document["components"]["schemas"])


def test_the_docs_page_and_its_parts_come_from_here(api: Api) -> None:
    page = api.client.get("/docs")
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)

    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe-eval" not in page.headers["content-security-policy"]
    assert all(part.startswith("/") for part in parts)
    assert {api.client.get(part).status_code for part in parts} == {200}
    assert "<script>" not in page.text
    assert {f"/docs/{name}" for name in ASSETS} <= set(parts)


def test_the_vendored_page_brings_its_license() -> None:
    assert "Apache License" in (WEB / "swagger" / "LICENSE").read_text()


def test_the_bare_address_leads_to_the_docs(api: Api) -> None:
    assert api.client.get("/", follow_redirects=True).url.path == "/docs"
    assert api.client.get("/docs/../__main__.py").status_code == 404
    assert api.client.get("/docs/%2e%2e%2f__init__.py").status_code == 404
