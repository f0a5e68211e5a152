"""A request sent twice with one Idempotency-Key has one effect and one answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from core.db.idempotency import find_answer, remember_answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler that starts work says: the resource, and where it is."""

    body: BaseModel
    location: str | None = None
    status_code: int = 202


@dataclass(frozen=True, slots=True)
class Once:
    """This request's idempotency key, if it has one."""

    key: str | None
    api_key_id: str
    fingerprint: str

    def find(self, session: Session) -> Response | None:
        """The answer to the same request before; None at the first use. IdempotencyMismatch for another request."""
        if self.key is None:
            return None
        record = find_answer(session, key=self.key, api_key_id=self.api_key_id, fingerprint=self.fingerprint)
        return None if record is None else _response(record.body, record.status_code, record.location, replayed=True)

    def run(self, session: Session, work: Callable[[], Answer]) -> Response:
        """Do the work and remember its answer, in the session's transaction; or answer as before."""
        before = self.find(session)
        if before is not None:
            return before
        answer = work()
        body = answer.body.model_dump(mode="json")
        if self.key is not None:
            remember_answer(
                session,
                key=self.key,
                api_key_id=self.api_key_id,
                fingerprint=self.fingerprint,
                status_code=answer.status_code,
                body=body,
                location=answer.location,
            )
        return _response(body, answer.status_code, answer.location)


def _response(body: dict[str, Any], status_code: int, location: str | None, *, replayed: bool = False) -> Response:
    headers = {"Retry-After": "1"} if status_code == 202 else {}
    if location is not None:
        headers["Location"] = location
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return JSONResponse(body, status_code, headers=headers)


async def read_once(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=200, description="Any text of your own; a repeated request with it gets the first answer again."),
    ] = None,
) -> Once:
    """Dependency: the key, and a digest of what it may be used for."""
    parts = (request.method, request.url.path, request.url.query, hashlib.sha256(await request.body()).hexdigest())
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Once(idempotency_key, request.state.principal.key_id, fingerprint)


OnceDep = Annotated[Once, Depends(read_once)]
