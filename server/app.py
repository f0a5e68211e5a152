"""The application: middleware from the outside in, and every noun's router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import APIRouter, FastAPI

from core.errors import SetupError
from core.settings import Settings
from core.version import VERSION
from server import (
    api_keys,
    batch_predictions,
    dataset_deletion,
    datasets,
    disk_use,
    docs,
    generations,
    health,
    iterations,
    jobs,
    predict,
    promotions,
    pseudo_labels,
    recipes,
    runs,
    workers,
)
from server.auth import Authentication, is_loopback
from server.dependencies import Services
from server.errors import install_error_handlers
from server.frame import RequestFrame
from server.limits import BodyLimits, InFlight
from server.openapi import DESCRIPTION, PREDICTOR_DESCRIPTION, TAGS, install_openapi

ROUTERS: list[APIRouter] = [
    datasets.router,
    dataset_deletion.router,
    recipes.router,
    runs.router,
    iterations.router,
    pseudo_labels.router,
    generations.router,
    promotions.router,
    batch_predictions.router,
    jobs.router,
    disk_use.router,
    workers.router,
    api_keys.router,
    health.router,
    docs.router,
]
PREDICTOR_ROUTERS: list[APIRouter] = [predict.router, health.predictor_router, docs.router]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the database and the files that the settings name; without settings they come from the environment."""
    settings = settings or Settings()
    # Routes are tried in order: the one that is asked most often comes first.
    routers = [predict.router if settings.predict else predict.elsewhere, *ROUTERS]
    return _assemble(settings, routers, title="Noisy Student Server", description=DESCRIPTION)


def create_predictor(settings: Settings | None = None) -> FastAPI:
    """/predict alone, to be run in any number beside the API: reads rows and stored files, writes nothing."""
    return _assemble(
        settings or Settings(), PREDICTOR_ROUTERS, title="Noisy Student Predictor", description=PREDICTOR_DESCRIPTION, predictor_only=True
    )


def _assemble(settings: Settings, routers: list[APIRouter], *, title: str, description: str, predictor_only: bool = False) -> FastAPI:
    check_keys_required(settings)
    services = Services(settings, predictor_only=predictor_only)
    tags = {tag for router in routers for tag in router.tags}
    app = FastAPI(
        title=title,
        version=VERSION,
        description=description,
        openapi_tags=[tag for tag in TAGS if tag["name"] in tags],
        docs_url=None,
        redoc_url=None,
        lifespan=_make_lifespan(services),
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    install_error_handlers(app)
    for router in routers:
        app.include_router(router)
    install_openapi(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(InFlight, most=settings.predict_in_flight)
    app.add_middleware(Authentication, keys=services.keys, required=settings.require_keys)
    app.add_middleware(RequestFrame, metrics=services.metrics)
    return app


def _make_lifespan(services: Services) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        services.serving.start()
        yield
        services.progress.stop()
        services.close()

    return lifespan


def check_keys_required(settings: Settings) -> None:
    """SetupError when keys are off on an address that others can reach."""
    if not settings.require_keys and not is_loopback(settings.host):
        raise SetupError(f"keys may be switched off on a loopback address only, not on {settings.host}")
