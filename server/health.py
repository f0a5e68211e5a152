"""Is the process alive, is it ready, and its numbers."""

from __future__ import annotations

from functools import cache
from typing import Literal

import sqlalchemy.exc
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from core.db.schema import current_revision, newest_revision
from core.errors import StorageError
from core.version import VERSION
from server.dependencies import Services, ServicesDep
from server.metrics import MEDIA_TYPE

router = APIRouter(tags=["health"])


class Liveness(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"
    version: str = VERSION


class Readiness(BaseModel):
    """Each check with `ok` or what is wrong."""

    status: Literal["ready", "not ready"]
    checks: dict[str, str]


@router.get("/livez", summary="Is the process alive?", response_model=Liveness)
async def get_liveness() -> Liveness:
    """Answers as long as the process can; asks nobody."""
    return Liveness()


@router.get(
    "/readyz",
    summary="Can requests be served?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not ready; `checks` says why."}},
)
def get_readiness(services: ServicesDep) -> Response:
    """Database reachable, its schema the one this version needs, storage there."""
    checks = {"database": _check_database(services), "storage": _check_storage(services)}
    ready = all(answer == "ok" for answer in checks.values())
    body = Readiness(status="ready" if ready else "not ready", checks=checks)
    return JSONResponse(body.model_dump(mode="json"), 200 if ready else 503)


@cache
def _newest() -> str:
    return newest_revision()


def _check_database(services: Services) -> str:
    try:
        current = current_revision(services.database)
    except sqlalchemy.exc.SQLAlchemyError as error:
        return f"the database does not answer: {type(error).__name__}"
    return "ok" if current == _newest() else f"the database has schema {current}, this version needs {_newest()}"


def _check_storage(services: Services) -> str:
    try:
        services.storage.check()
    except StorageError as error:
        return error.message
    return "ok"


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_metrics(services: ServicesDep) -> Response:
    """Requests of this process, and jobs, runs, workers and hints of the whole service."""
    with services.database.reading() as session:
        services.metrics.read_rows(session)
    services.metrics.streams.set(services.progress.num_watches)
    return Response(services.metrics.render(), media_type=MEDIA_TYPE)
