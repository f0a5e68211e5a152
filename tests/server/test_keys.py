"""Who may do what: every route asks for a key and for its own scope, before it does anything else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts

from core.db.api_keys import create_api_key, revoke_api_key
from core.db.session import Database
from core.errors import SetupError
from core.lifecycle import SCOPES
from core.settings import Settings
from server.app import create_app
from server.auth import SCOPES_OF_NOUN, KeyRing, Principal, needed_scope
from tests.server.builders import Api, api_in_process

OPEN = {"/", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/{name}", "/problems/{code}"}


def list_routes() -> list[tuple[str, str]]:
    app = create_app(Settings(data_directory=Path("/nowhere"), require_keys=False))
    found = [(method, route.path or "") for route in iter_route_contexts(app.routes) for method in sorted(route.methods or ())]
    return sorted(route for route in found if route[0] != "HEAD")


ROUTES = list_routes()
GUARDED = [(method, path) for method, path in ROUTES if path not in OPEN]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api_in_process(tmp_path_factory.mktemp("keys"), require_keys=True) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_key_every_route_answers_401(api: Api, method: str, path: str) -> None:
    answer = api.client.request(method, path)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_with_every_other_scope_every_route_answers_403(api: Api, method: str, path: str) -> None:
    needed = needed_scope(method, path)
    others = [scope for scope in SCOPES if scope not in (needed, "admin")]

    answer = api.client.request(method, path, headers=api.key(*others))

    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert answer.json()["details"]["scope"] == needed


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_with_its_scope_alone_every_route_lets_the_request_in(api: Api, method: str, path: str) -> None:
    needed = needed_scope(method, path)
    assert needed

    answer = api.client.request(method, path, headers=api.key(needed))

    assert answer.status_code not in (401, 403)


def test_every_noun_below_the_api_has_its_scopes() -> None:
    nouns = {path.split("/")[3] for _, path in ROUTES if path.startswith("/api/v1/")}

    assert nouns == set(SCOPES_OF_NOUN)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/init.js", "/problems/leakage"])
def test_health_and_documentation_need_no_key(api: Api, path: str) -> None:
    assert api.client.get(path).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer nss_wrong", "Basic bnNzOng=", "Bearer \xff"])
def test_what_is_no_known_key_is_refused(api: Api, header: str) -> None:
    answer = api.client.get("/api/v1/jobs", headers={"Authorization": header.encode("latin-1")})

    assert answer.status_code == 401


def test_an_unknown_route_is_not_told_to_strangers(api: Api) -> None:
    assert api.client.get("/api/v1/nothing").status_code == 401
    assert api.client.get("/api/v1/nothing", headers=api.key("predict")).status_code == 404


def test_a_key_is_shown_once_works_and_ends_when_it_is_revoked(api: Api) -> None:
    admin = api.key("admin")
    made = api.client.post("/api/v1/api-keys", json={"name": "host", "scopes": ["jobs:read"]}, headers=admin)
    assert made.status_code == 201
    key = {"Authorization": f"Bearer {made.json()['secret']}"}
    before = api.client.get("/api/v1/jobs", headers=key).status_code

    gone = api.client.delete(f"/api/v1/api-keys/{made.json()['id']}", headers=admin)

    assert (before, gone.status_code, api.client.get("/api/v1/jobs", headers=key).status_code) == (200, 204, 401)
    listed = api.client.get("/api/v1/api-keys?limit=200", headers=admin).json()["items"]
    assert all("secret" not in one for one in listed)
    assert next(one for one in listed if one["id"] == made.json()["id"])["revoked_at"] is not None


class Overtaken:
    """Stands in for the ring's lock, which another thread takes first, just once: it revokes the key."""

    def __init__(self, ring: KeyRing, key_id: str) -> None:
        self.lock, self.ring, self.key_id = threading.Lock(), ring, key_id
        self.overtaken = False

    def __enter__(self) -> None:
        if not self.overtaken:
            self.overtaken = True
            with self.ring._database.transaction() as session:
                revoke_api_key(session, self.key_id)
            self.ring.forget()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_a_key_that_is_revoked_before_its_answer_is_kept_is_not_remembered(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(database)
    with database.transaction() as session:
        key, secret = create_api_key(session, name="host", scopes=["predict"])
    monkeypatch.setattr(ring, "_lock", Overtaken(ring, key.id))

    async def ask_twice() -> tuple[Principal | None, Principal | None]:
        return await ring.find(secret), await ring.find(secret)

    before, after = asyncio.run(ask_twice())

    # The first question was answered before the key was revoked.
    assert before == Principal(key.id, "host", frozenset({"predict"}))
    assert after is None


def test_an_unknown_scope_is_refused_with_the_known_ones(api: Api) -> None:
    answer = api.client.post("/api/v1/api-keys", json={"name": "host", "scopes": ["everything"]}, headers=api.key("admin"))

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/scopes"
    assert "datasets:read" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])
def test_keys_can_be_switched_off_on_loopback_only(tmp_path: Path, host: str) -> None:
    with pytest.raises(SetupError, match="loopback"):
        create_app(Settings(data_directory=tmp_path, require_keys=False, host=host))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "example.org"}, 403),
        ({"Host": "[::1"}, 403),
    ],
)
def test_without_keys_other_sites_in_a_browser_may_ask_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    with api_in_process(tmp_path, require_keys=False) as api:
        assert api.client.get("/api/v1/jobs", headers=headers).status_code == status
