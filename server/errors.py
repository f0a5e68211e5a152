"""Every way out that is not a success: one table from error class to status and code, and problem+json (RFC 9457) for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import sqlalchemy.exc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Scope

from core import errors
from core.logs import get_log
from ml import errors as ml_errors
from ml.errors import MlError, RecipeError

MEDIA_TYPE = "application/problem+json"

PROBLEMS: dict[type[Exception], tuple[int, str]] = {
    errors.ServiceError: (500, "internal_error"),
    errors.NotFound: (404, "not_found"),
    errors.PredictElsewhere: (404, "predict_elsewhere"),
    errors.Expired: (410, "expired"),
    errors.InvalidRequest: (422, "invalid_request"),
    errors.FolderRefused: (422, "folder_refused"),
    errors.LeakageFound: (422, "leakage"),
    errors.Conflict: (409, "conflict"),
    errors.AlreadyExists: (409, "already_exists"),
    errors.NotReady: (409, "not_ready"),
    errors.WrongState: (409, "wrong_state"),
    errors.StillReferenced: (409, "still_referenced"),
    errors.IdempotencyMismatch: (409, "idempotency_mismatch"),
    errors.GateRefused: (409, "gate_refused"),
    errors.PreconditionRequired: (428, "precondition_required"),
    errors.PreconditionFailed: (412, "precondition_failed"),
    errors.Unauthenticated: (401, "unauthenticated"),
    errors.Forbidden: (403, "forbidden"),
    errors.PayloadTooLarge: (413, "payload_too_large"),
    errors.UnsupportedMedia: (415, "unsupported_media"),
    errors.BadImageRefused: (422, "bad_image"),
    errors.NothingPromoted: (503, "nothing_promoted"),
    errors.Overloaded: (503, "overloaded"),
    errors.TooManyInFlight: (429, "too_many_in_flight"),
    errors.PredictorHung: (503, "predictor_hung"),
    errors.StorageError: (503, "storage_unavailable"),
    errors.StorageFull: (507, "storage_full"),
    errors.StorageDamaged: (500, "storage_damaged"),
    errors.SetupError: (500, "setup_error"),
    errors.DataDirectoryRefused: (500, "data_directory_refused"),
    errors.PortInUse: (500, "port_in_use"),
    errors.SchemaMismatch: (503, "schema_mismatch"),
    errors.SchemaBusy: (503, "schema_busy"),
    ml_errors.MlError: (422, "invalid_request"),
    ml_errors.RecipeError: (422, "invalid_recipe"),
    ml_errors.UnknownArchitecture: (422, "unknown_architecture"),
    ml_errors.DataError: (422, "invalid_data"),
    ml_errors.NoImages: (422, "no_images"),
    ml_errors.BadImage: (422, "bad_image"),
    ml_errors.ClassMismatch: (422, "class_mismatch"),
    ml_errors.Leakage: (422, "leakage"),
    ml_errors.StoreRefused: (503, "store_refused"),
    ml_errors.TooFewLabels: (422, "too_few_labels"),
    ml_errors.SelectionError: (422, "selection_failed"),
    ml_errors.NothingSelected: (422, "nothing_selected"),
    ml_errors.PoolTooSmall: (422, "pool_too_small"),
    ml_errors.WeightsError: (422, "weights_refused"),
    # The rest happens in attempts; should one ever surface here, it says what it is.
    ml_errors.CheckpointDamaged: (500, "checkpoint_damaged"),
    ml_errors.Diverged: (500, "diverged"),
    ml_errors.OutOfMemory: (503, "out_of_memory"),
    ml_errors.DiskFull: (507, "storage_full"),
    ml_errors.LoaderLost: (500, "loader_lost"),
    ml_errors.StoreAway: (503, "store_away"),
    ml_errors.Interrupted: (503, "interrupted"),
}
"""Status and code of each error class; a class that is missing here would be answered as its parent."""

_CODES_OF_STATUS = {404: "no_such_route", 405: "method_not_allowed", 408: "request_timeout", 413: "payload_too_large", 503: "unavailable"}


class Problem(Exception):
    """What a client gets to see of a failure."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        errors: Sequence[dict[str, Any]] = (),
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = list(errors)
        self.details = details or {}
        self.headers = headers or {}

    def to_response(self, scope: Scope) -> JSONResponse:
        """The problem+json of this request."""
        body: dict[str, Any] = {
            "type": f"/problems/{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": scope.get("state", {}).get("request_id"),
        }
        if self.errors:
            body["errors"] = self.errors
        if self.details:
            body["details"] = self.details
        return JSONResponse(body, self.status, headers=self.headers, media_type=MEDIA_TYPE)


def to_problem(error: Exception) -> Problem:
    """Translate any exception; what nobody expected becomes a 500 that tells nothing."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, errors.ServiceError | MlError):
        return _domain_problem(error)
    if isinstance(error, RequestValidationError):
        return _validation_problem(error)
    if isinstance(error, HTTPException):
        code = _CODES_OF_STATUS.get(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
        return Problem(error.status_code, code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        return _database_problem(error)
    if isinstance(error, ClientDisconnect):
        # Nobody hears this; it is counted, and no defect of ours.
        return Problem(400, "client_disconnected", "the connection ended before the request did")
    return Problem(500, "internal_error", "something went wrong here, not in your request; the log has it under the request_id")


def _domain_problem(error: errors.ServiceError | MlError) -> Problem:
    status, code = next(PROBLEMS[cls] for cls in type(error).__mro__ if cls in PROBLEMS)
    details = dict(error.details)
    pointer = details.pop("pointer", None)
    parameter = details.pop("parameter", None)
    message = str(error)
    if isinstance(error, RecipeError):
        pointer = f"/recipe{error.pointer}"
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="noisy-student"'
    if status in (429, 503, 507) or "retry_after_seconds" in details:
        headers["Retry-After"] = str(max(1, round(details.get("retry_after_seconds", 5))))
    found = [] if pointer is None else [{"pointer": pointer, "message": message}]
    if parameter is not None:
        found.append({"parameter": parameter, "in": "query", "message": message})
    return Problem(status, code, message, errors=found, details=details, headers=headers)


def _validation_problem(error: RequestValidationError) -> Problem:
    found = []
    for one in error.errors():
        place, *path = one["loc"]
        if one["type"] == "json_invalid":
            path = []
        if place == "body":
            found.append({"pointer": "".join(f"/{_escaped(part)}" for part in path), "message": one["msg"]})
        else:
            found.append({"parameter": ".".join(str(part) for part in path), "in": place, "message": one["msg"]})
    first = found[0]
    where = first.get("pointer") or first.get("parameter") or "the body"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Problem(422, "invalid_request", f"{where}: {first['message']}{more}", errors=found[:100])


def _escaped(part: object) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _database_problem(error: sqlalchemy.exc.SQLAlchemyError) -> Problem:
    if isinstance(error, sqlalchemy.exc.IntegrityError):
        return Problem(409, "conflict", "another request changed the same thing at the same moment; read it again and decide anew")
    if isinstance(error, sqlalchemy.exc.DataError):
        return Problem(422, "invalid_request", "a value cannot be stored: a text holds a zero character, or a number is too large")
    if isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError | sqlalchemy.exc.TimeoutError):
        # The answer to a commit may be what was lost, so nobody here knows.
        message = "the database does not answer; send the request again, with the same Idempotency-Key where it has one"
        return Problem(503, "database_unavailable", message, headers={"Retry-After": "2"})
    return to_problem(RuntimeError("unexpected database error"))


def log_problem(problem: Problem, error: Exception, scope: Scope) -> None:
    """Log a failure of ours once, here at the edge; a refusal is the client's news."""
    if problem.status >= 500 and problem.code not in ("nothing_promoted", "overloaded", "predictor_hung"):
        get_log().error(
            "request.failed",
            code=problem.code,
            request_id=scope.get("state", {}).get("request_id"),
            method=scope.get("method"),
            path=scope.get("path"),
            exc_info=error,
        )


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception that a route raises with its problem."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        problem = to_problem(error)
        log_problem(problem, error, request.scope)
        return problem.to_response(request.scope)

    handled = (Problem, errors.ServiceError, MlError, RequestValidationError, ResponseValidationError, HTTPException)
    for cls in (*handled, sqlalchemy.exc.SQLAlchemyError):
        app.add_exception_handler(cls, answer)
