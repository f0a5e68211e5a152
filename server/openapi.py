"""The OpenAPI document: headings, examples' home, and the problems and scopes that every operation shares."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.auth import needed_scope
from server.errors import MEDIA_TYPE, PROBLEMS

DESCRIPTION = """Train image classifiers the Noisy Student way: a teacher labels your unlabeled images, a noised student learns from both.

**From folders to predictions:** register datasets (`POST /datasets`), start a run (`POST /runs`), watch it
(`GET /runs/{run_id}/events`), compare its generations, promote one (`PUT /aliases/{name}`), ask `POST /predict`.

Press **Authorize** and paste your API key (`nss_…`). Work is answered with 202, a `Location` and a job; every error is
`application/problem+json` with a stable `code`. Lists come in pages: send `next_cursor` as `cursor`. Send an `Idempotency-Key` with
whatever starts work, and a repeated request has one effect."""

PREDICTOR_DESCRIPTION = """Ask promoted generations about images. This is a predictor replica: it answers `/predict` and nothing
else; what it answers by is decided at the API, and every answer names its generation.

Press **Authorize** and paste an API key (`nss_…`) with the scope `predict`. Every error is `application/problem+json` with a stable
`code`."""

TAGS: list[dict[str, Any]] = [
    {"name": "datasets", "description": "Folders of images, read into immutable versions."},
    {"name": "recipes", "description": "Presets: every knob of a run with its value."},
    {"name": "runs", "description": "Teacher, students and their iterations."},
    {"name": "pseudo-labels", "description": "What a generation guessed, and what selection kept."},
    {"name": "generations", "description": "Trained networks: metrics, lineage, files."},
    {"name": "promotions", "description": "Aliases such as `production`, moved through a gate."},
    {"name": "predict", "description": "Ask a promoted generation about images."},
    {"name": "jobs", "description": "Everything that runs: status, progress, logs, cancel, retry."},
    {"name": "disk-use", "description": "How much storage is in use by what, and what deleting it would free."},
    {"name": "workers", "description": "Who runs jobs, and how many wait."},
    {"name": "api-keys", "description": "Who may do what."},
    {"name": "health", "description": "Liveness, readiness, metrics."},
]

_SHARED = {
    401: "No API key, or none that is known.",
    403: "The key lacks the scope.",
    422: "The request makes no sense; `errors` says where.",
}
_SHARED |= {500: "A defect of the service; the log has it under the `request_id`.", 503: "The database or the storage does not answer."}


class FieldProblem(BaseModel):
    """One thing that is wrong with a request."""

    message: str
    pointer: str | None = None
    """JSON pointer into the body."""
    parameter: str | None = None
    """Name of the query, path or header parameter."""


class ProblemDocument(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    """Stable; made for programs."""
    request_id: str | None
    errors: list[FieldProblem] = []
    details: dict[str, Any] = {}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: the problems it answers beside those that every route may answer."""
    return {status: _problem_response(_codes_of(status)) for status in statuses}


def _codes_of(status: int) -> str:
    codes = sorted({code for of, code in PROBLEMS.values() if of == status})
    return f"Problem; `code` is one of {', '.join(codes)}." if codes else "Problem."


def _problem_response(description: str) -> dict[str, Any]:
    return {"description": description, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}}


def install_openapi(app: FastAPI) -> None:
    """Replace the app's OpenAPI document by one that also tells about keys, scopes and problems."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(make())
        return app.openapi_schema

    # FastAPI's documented way to change the document.
    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schema = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    schemas["ProblemDocument"] = schema
    # FastAPI's own shape of a 422 is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key, `nss_…`."}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(operation, needed_scope(method.upper(), path))
    return document


def _complete_operation(operation: dict[str, Any], scope: str | None) -> None:
    responses = operation["responses"]
    shared = _SHARED if scope is not None else {500: _SHARED[500]}
    if "422" in responses and "HTTPValidationError" in str(responses["422"]):
        del responses["422"]
    for status, description in shared.items():
        responses.setdefault(str(status), _problem_response(description))
    if scope is not None:
        operation["security"] = [{"key": []}]
        operation["description"] = f"{operation.get('description', '')}\n\nNeeds the scope `{scope}`.".strip()
