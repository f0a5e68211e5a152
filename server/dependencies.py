"""What handlers share: settings, database, storage, and who asks."""

from __future__ import annotations

import threading
from typing import Annotated

import sqlalchemy.exc
from fastapi import APIRouter, Depends, Request

from core.db.api_keys import get_shared_secret
from core.db.session import Database
from core.settings import Settings
from core.storage import Storage, make_storage
from ml import objects
from ml.locations import find_stored_at
from server.auth import KeyRing, Principal
from server.counted import Counted
from server.metrics import Metrics
from server.pages import Cursors
from server.progress import ProgressHub
from server.serving import Serving
from server.stored_files import StoredFiles
from server.strict_json import StrictRoute
from server.waiting import QueueCounts

API = "/api/v1"


def _read_access(settings: Settings) -> objects.Access:
    named = settings.dataset_access
    return objects.Access(
        endpoint_url=named.get("AWS_ENDPOINT_URL_S3"),
        region=named.get("AWS_DEFAULT_REGION"),
        access_key_id=named.get("AWS_ACCESS_KEY_ID"),
        secret_access_key=named.get("AWS_SECRET_ACCESS_KEY"),
        attempts=2,
        read_timeout_seconds=10,
    )


class Services:
    """Everything that one app opened; lives as long as the app."""

    def __init__(self, settings: Settings, *, predictor_only: bool = False) -> None:
        self.settings = settings
        self.database = Database(settings.resolved_database_url)
        self.storage: Storage = make_storage(settings)
        self.files = StoredFiles(self.database, self.storage)
        # For the images that people look at; somebody waits for them.
        objects.use(_read_access(settings))
        find_stored_at(self.storage.root)
        self.keys = KeyRing(self.database)
        self.metrics = Metrics(of_rows=not predictor_only)
        self.progress = ProgressHub(self.database)
        self.queued: Counted[QueueCounts] = Counted()
        answers = settings.predict or predictor_only
        self.serving = Serving(settings, self.database, self.storage, self.files, self.metrics, answers=answers)
        self._cursors: Cursors | None = None
        self._lock = threading.Lock()

    @property
    def cursors(self) -> Cursors:
        """Signs page cursors with the key that all replicas share."""
        with self._lock:
            if self._cursors is None:
                self._cursors = Cursors(self._read_cursor_key())
            return self._cursors

    def _read_cursor_key(self) -> bytes:
        try:
            with self.database.transaction() as session:
                return get_shared_secret(session, "cursors")
        except sqlalchemy.exc.IntegrityError:
            # Another replica made it at the same moment.
            with self.database.reading() as session:
                return get_shared_secret(session, "cursors")

    def close(self) -> None:
        """Stop answering, give connections back."""
        self.serving.close()
        self.database.close()


async def get_services(request: Request) -> Services:
    """Dependency: the app's services."""
    services: Services = request.app.state.services
    return services


async def get_principal(request: Request) -> Principal:
    """Dependency: who asks."""
    principal: Principal = request.state.principal
    return principal


ServicesDep = Annotated[Services, Depends(get_services)]
PrincipalDep = Annotated[Principal, Depends(get_principal)]


def make_router(tag: str, *, prefix: str = API) -> APIRouter:
    """A noun's router: its routes read JSON strictly and stand under one heading of the documentation."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=StrictRoute)
