"""API keys: made with scopes, shown once, revoked."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from core.db.api_keys import create_api_key as insert_api_key
from core.db.api_keys import revoke_api_key as revoke
from core.db.tables import ApiKey
from core.lifecycle import SCOPES
from server.dependencies import ServicesDep, make_router
from server.openapi import problems
from server.pages import Page, PageDep, read_page

router = make_router("api-keys")

EXAMPLE: dict[str, Any] = {"name": "labeling host", "scopes": ["datasets:read", "predict"]}


class NewApiKey(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, json_schema_extra={"examples": [EXAMPLE]})

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """For people: who or what uses it."""
    scopes: Annotated[list[str], Field(min_length=1, max_length=len(SCOPES), json_schema_extra={"items": {"enum": list(SCOPES)}})]
    """What it may do; `admin` may do everything."""


class ApiKeyView(BaseModel):
    """A key, without its secret."""

    id: str
    name: str
    scopes: list[str]
    created_at: datetime
    revoked_at: datetime | None


class NewApiKeyView(ApiKeyView):
    """A key with its secret, which is shown this once."""

    secret: str


@router.post("/api-keys", status_code=201, summary="Make a key", responses=problems(415))
def create_api_key(body: NewApiKey, services: ServicesDep, response: Response) -> NewApiKeyView:
    """The answer holds the secret, which is stored nowhere: keep it now."""
    with services.database.transaction() as session:
        key, secret = insert_api_key(session, name=body.name, scopes=body.scopes)
        view = NewApiKeyView(**_facts(key), secret=secret)
    response.headers["Location"] = f"/api/v1/api-keys/{key.id}"
    return view


@router.get("/api-keys", summary="List keys")
def list_api_keys(services: ServicesDep, page: PageDep) -> Page[ApiKeyView]:
    """Newest first, revoked ones included."""
    cursors = services.cursors
    with services.database.reading() as session:
        rows, cursor = read_page(session, sa.select(ApiKey), ApiKey.id, page, cursors=cursors, listing="api-keys")
        return Page(items=[ApiKeyView(**_facts(key)) for key in rows], next_cursor=cursor)


@router.delete("/api-keys/{key_id}", status_code=204, summary="Revoke a key", responses=problems(404))
def revoke_api_key(key_id: str, services: ServicesDep) -> None:
    """It stops working at once here, and within five seconds on every other replica. Revoking twice changes nothing."""
    with services.database.transaction() as session:
        revoke(session, key_id)
    services.keys.forget()


def _facts(key: ApiKey) -> dict[str, Any]:
    return {"id": key.id, "name": key.name, "scopes": key.scopes, "created_at": key.created_at, "revoked_at": key.revoked_at}
