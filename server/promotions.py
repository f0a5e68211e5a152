"""Aliases: names such as `production` that point at a generation, moved through a gate and moved back in one call."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Body, Header, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from core.db.generations import get_generation
from core.db.promotions import get_alias, move_alias, rollback_target
from core.db.tables import Alias, Promotion
from core.errors import InvalidRequest, NotFound, PreconditionFailed, PreconditionRequired
from server.dependencies import PrincipalDep, Services, ServicesDep, make_router
from server.gate import PREDICTIONS, pass_gate
from server.openapi import problems
from server.pages import Page, PageDep, read_page

router = make_router("promotions")

AliasName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="For example `production`.")]
IfMatch = Annotated[str | None, Header(max_length=200, description='The ETag that you saw, for example `"v3"`.')]
IfNoneMatch = Annotated[str | None, Header(max_length=200, description="`*` to create an alias that is not there yet.")]
_ETAG = re.compile(r'"v(\d{1,15})"')


class AliasView(BaseModel):
    """A name and what it points at."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    generation_id: str
    version: int
    """Counts its moves; the ETag is `"v<version>"`."""
    updated_at: datetime


class AliasList(BaseModel):
    """Every alias."""

    items: list[AliasView]


class PromotionRequest(BaseModel):
    """Which generation the alias shall point at."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [{"generation": "gen_01m7wgtp77grsvqrmzq6wz5cgs"}]}
    )

    generation: Annotated[str, Field(min_length=1, max_length=100)]
    force: bool = False
    """Move it although the gate refuses; needs a reason."""
    reason: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    """Kept in the history."""


class RollbackRequest(BaseModel):
    """Why the alias goes back."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(min_length=1, max_length=2000)] | None = None


class PromotionView(BaseModel):
    """One move of an alias; replaying all of them gives what it points at."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    alias: str
    version: int
    action: Literal["promote", "rollback"]
    generation_id: str
    previous_generation_id: str | None
    forced: bool
    reason: str | None
    gate: dict[str, Any] | None
    """What the gate compared and decided."""
    actor: str | None
    """The API key that asked."""
    created_at: datetime


def _show(alias: Alias) -> AliasView:
    return AliasView(name=alias.name, generation_id=alias.generation_id, version=alias.version, updated_at=alias.updated_at)


def _etag(version: int) -> str:
    return f'"v{version}"'


def _expected_version(if_match: str | None, if_none_match: str | None) -> int | None:
    """The version that the caller saw; None when it saw no alias."""
    if if_match is None and if_none_match is None:
        raise PreconditionRequired('send If-Match with the ETag of GET /aliases/{name}, or "If-None-Match: *" to create the alias')
    if if_match is None:
        if if_none_match != "*":
            raise InvalidRequest("If-None-Match must be *", parameter="if-none-match")
        return None
    found = _ETAG.fullmatch(if_match.strip())
    if found is None:
        raise PreconditionFailed(f'If-Match {if_match!r} is no ETag of an alias; they look like "v3"')
    return int(found[1])


@router.get("/aliases", summary="List aliases")
def list_aliases(services: ServicesDep) -> AliasList:
    """By name; there are few."""
    with services.database.reading() as session:
        return AliasList(items=[_show(alias) for alias in session.scalars(sa.select(Alias).order_by(Alias.name).limit(1000))])


@router.get("/aliases/{name}", summary="Read an alias", responses=problems(404))
def read_alias(name: AliasName, services: ServicesDep, response: Response) -> AliasView:
    """Its ETag is what moving it needs."""
    with services.database.reading() as session:
        alias = get_alias(session, name)
    response.headers["ETag"] = _etag(alias.version)
    return _show(alias)


@router.put("/aliases/{name}", summary="Promote a generation", responses=problems(404, 409, 412, 413, 415, 428))
def promote(
    name: AliasName,
    body: PromotionRequest,
    *,
    services: ServicesDep,
    principal: PrincipalDep,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> AliasView:
    """Through the gate: refused when validation says with 95 % certainty that it is worse than what the alias points at.

    Answers after this replica has loaded, warmed and switched to it; others follow within seconds, and every prediction names its
    generation. Promoting what the alias already points at changes nothing.
    """
    if body.force and body.reason is None:
        raise InvalidRequest("force needs a reason; the history keeps it", pointer="/reason")
    expected = _expected_version(if_match, if_none_match)
    alias = _current(services, name, expected)
    _check_there(services, body.generation)
    if alias is not None and alias.generation_id == body.generation:
        response.headers["ETag"] = _etag(alias.version)
        return _show(alias)
    gate = _pass_gate(services, alias, body)
    forced = gate["decision"].startswith("forced")
    return _move(
        services,
        name,
        body.generation,
        expected,
        response,
        action="promote",
        gate=gate,
        forced=forced,
        reason=body.reason,
        actor=principal.key_id,
    )


def _pass_gate(services: Services, alias: Alias | None, body: PromotionRequest) -> dict[str, Any]:
    files = services.serving.generation_files
    incumbent_id = None if alias is None else alias.generation_id
    before: AbstractContextManager[dict[str, Any]] = nullcontext({}) if incumbent_id is None else files(incumbent_id, PREDICTIONS)
    with before as incumbent, files(body.generation, PREDICTIONS) as candidate:
        return pass_gate(
            incumbent_id=incumbent_id, incumbent=incumbent, candidate_id=body.generation, candidate=candidate, force=body.force
        )


@router.post("/aliases/{name}/rollback", summary="Roll an alias back", responses=problems(404, 409, 412, 413, 415, 428))
def rollback(
    name: AliasName,
    *,
    services: ServicesDep,
    principal: PrincipalDep,
    response: Response,
    body: Annotated[RollbackRequest | None, Body(examples=[{"reason": "complaints about roses"}])] = None,
    if_match: IfMatch = None,
) -> AliasView:
    """To the generation before the last promotion, without a gate. Once more goes one promotion further back."""
    expected = _expected_version(if_match, None)
    if _current(services, name, expected) is None:
        raise NotFound(f"there is no alias {name!r}: nothing was promoted to it yet")
    with services.database.reading() as session:
        target = rollback_target(session, name)
    reason = None if body is None else body.reason
    return _move(services, name, target, expected, response, action="rollback", reason=reason, actor=principal.key_id)


def _current(services: Services, name: str, expected: int | None) -> Alias | None:
    """The alias as it is; PreconditionFailed at once when the caller saw another version."""
    with services.database.reading() as session:
        alias = session.get(Alias, name)
    current = None if alias is None else alias.version
    if current != expected:
        raise PreconditionFailed(
            f"alias {name!r} is at {'no version' if current is None else _etag(current)}, "
            f"not at {'none' if expected is None else _etag(expected)}; read it again and decide anew",
            current_version=current,
        )
    return alias


def _check_there(services: Services, generation_id: str) -> None:
    """NotReady while it is in training; InvalidRequest when it is nowhere."""
    try:
        with services.database.reading() as session:
            get_generation(session, generation_id)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer="/generation") from error


def _move(
    services: Services,
    name: str,
    generation_id: str,
    expected: int | None,
    response: Response,
    *,
    action: Literal["promote", "rollback"],
    reason: str | None,
    actor: str,
    gate: dict[str, Any] | None = None,
    forced: bool = False,
) -> AliasView:
    """Load and warm, then move the row, then switch: what cannot answer is never pointed at."""
    serving = services.serving
    served = serving.predictor.load(generation_id)
    if gate is not None:
        gate["latency_seconds"] = served.latency_seconds
    with services.database.transaction() as session:
        move_alias(
            session, name, generation_id, expected_version=expected, action=action, actor=actor, gate=gate, forced=forced, reason=reason
        )
        view = _show(get_alias(session, name))
    serving.switch(name, served, version=view.version)
    response.headers["ETag"] = _etag(view.version)
    return view


@router.get("/aliases/{name}/history", summary="Read an alias's history", responses=problems(404))
def read_history(name: AliasName, services: ServicesDep, page: PageDep) -> Page[PromotionView]:
    """Newest first, with what the gate decided and who asked."""
    cursors = services.cursors
    with services.database.reading() as session:
        get_alias(session, name)
        query = sa.select(Promotion).where(Promotion.alias == name)
        rows, cursor = read_page(session, query, Promotion.id, page, cursors=cursors, listing=f"history:{name}")
        items = [PromotionView(**{field: getattr(row, field) for field in PromotionView.model_fields}) for row in rows]
    return Page(items=items, next_cursor=cursor)
