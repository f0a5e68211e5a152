"""Is the process alive, is it ready, and its numbers."""

from __future__ import annotations

from typing import Literal

import sqlalchemy.exc
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from core.db.schema import current_revision, find_mismatch
from core.errors import PredictorHung, StorageError
from core.version import VERSION
from server.dependencies import Services, ServicesDep
from server.metrics import MEDIA_TYPE
from server.openapi import problems

router = APIRouter(tags=["health"])
predictor_router = APIRouter(tags=["health"])
"""The same addresses in a predictor replica, which answers from memory also while the database is away."""


class Liveness(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"
    version: str = VERSION


class Readiness(BaseModel):
    """Each check with `ok` or what is wrong."""

    status: Literal["ready", "not ready"]
    checks: dict[str, str]


@router.get("/livez", summary="Is the process alive?", responses=problems(503))
@predictor_router.get("/livez", summary="Is the process alive?", responses=problems(503))
async def get_liveness(services: ServicesDep) -> Liveness:
    """Answers as long as the process can, and asks nobody; 503 when an image is in work for so long that only a new start helps."""
    hung = services.serving.watchdog.hung
    if hung is not None:
        raise PredictorHung(hung)
    return Liveness()


@router.get(
    "/readyz",
    summary="Can requests be served?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not ready; `checks` says why."}},
)
def get_readiness(services: ServicesDep) -> Response:
    """Database reachable, its schema one that this version goes with, storage there."""
    checks = {"database": _check_database(services), "storage": _check_storage(services)}
    ready = all(answer == "ok" for answer in checks.values())
    body = Readiness(status="ready" if ready else "not ready", checks=checks)
    return JSONResponse(body.model_dump(mode="json"), 200 if ready else 503)


@predictor_router.get(
    "/readyz",
    summary="Can requests be served?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not ready; `checks` says why."}},
)
async def get_predictor_readiness(services: ServicesDep) -> Response:
    """From what this replica saw at its last look at the rows: the schema fits, and aliases are followed, loaded and warm.

    Ready means that what it is asked now, it answers rightly. A generation that cannot be loaded while the one before goes on
    answering, or a database that has been away for a few minutes, stands in `checks` and does not take the replica out.
    """
    ready, checks = services.serving.following.check()
    hung = services.serving.watchdog.hung
    checks["predictor"] = hung or "ok"
    ready = ready and hung is None
    return JSONResponse(Readiness(status="ready" if ready else "not ready", checks=checks).model_dump(mode="json"), 200 if ready else 503)


def _check_database(services: Services) -> str:
    try:
        problem = find_mismatch(current_revision(services.database))
    except sqlalchemy.exc.SQLAlchemyError as error:
        return f"the database does not answer: {type(error).__name__}"
    return problem or "ok"


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


@predictor_router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_predictor_metrics(services: ServicesDep) -> Response:
    """Requests, images and aliases of this replica; no rows are read."""
    return Response(services.metrics.render(), media_type=MEDIA_TYPE)
