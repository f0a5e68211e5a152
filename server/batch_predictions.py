"""Predictions over a whole dataset version, as a job."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from core.db.datasets import find_version, hold_version
from core.db.deletion import delete_prediction
from core.db.files import list_files
from core.db.generations import get_generation, hold_generation
from core.db.jobs import NewJob, enqueue, get_job
from core.db.promotions import get_alias
from core.errors import Expired, InvalidRequest, NotFound, NotReady
from ml.config import RuntimeConfig
from ml.validation import to_dict
from server.dependencies import API, ServicesDep, make_router
from server.idempotency import Answer, OnceDep
from server.job_views import JobView, accepted_job
from server.manifest_rows import read_rows
from server.openapi import problems
from server.pages import Page, PageDep
from server.recipe_bodies import ShownAs, build_part

router = make_router("predict")

_EXAMPLE: dict[str, Any] = {"alias": "production", "dataset": "flowers-unlabeled"}
_COLUMNS = ("key", "status", "class_name", "confidence", "top_class_names", "top_probs")


class BatchRequest(BaseModel):
    """Who answers (exactly one of generation and alias), and about which images."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [_EXAMPLE]})

    generation: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    alias: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """The generation that it points at now is taken."""
    dataset: Annotated[str, Field(min_length=1, max_length=300)]
    """`dsv_…`, NAME or NAME:NUMBER; any kind."""
    runtime: Annotated[dict[str, Any], ShownAs(RuntimeConfig)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> BatchRequest:
        if (self.generation is None) == (self.alias is None):
            raise ValueError("exactly one of generation and alias is needed")
        return self


class BatchCandidate(BaseModel):
    """One class and its calibrated probability."""

    label: str
    probability: float


class BatchItem(BaseModel):
    """One image of the dataset; `status` says why there is no guess."""

    key: str
    status: str
    class_name: str | None
    confidence: float | None
    top: list[BatchCandidate]


@router.post(
    "/batch-predictions",
    summary="Predict a whole dataset",
    status_code=202,
    response_model=JobView,
    responses=problems(404, 409, 413, 415),
)
def start_batch_prediction(body: BatchRequest, services: ServicesDep, once: OnceDep) -> Response:
    """A job answers about every image of the dataset version; its items are read below its id."""
    runtime = build_part(RuntimeConfig, body.runtime, base=RuntimeConfig(), pointer="/runtime")
    with services.database.transaction() as session:

        def start() -> Answer:
            generation_id, version_id = _find_generation(session, body), _find_ready(session, body.dataset)
            hold_generation(session, generation_id)
            hold_version(session, version_id)
            wanted = NewJob(
                kind="predict",
                input={"generation_id": generation_id, "version_id": version_id, "runtime": to_dict(runtime)},
                capability="cuda" if runtime.device == "cuda" else "cpu",
                max_attempts=services.settings.max_attempts,
            )
            [job] = enqueue(session, [wanted])
            return accepted_job(session, job, services.settings)

        return once.run(session, start)


def _find_generation(session: Session, body: BatchRequest) -> str:
    pointer = "/alias" if body.generation is None else "/generation"
    try:
        generation_id = get_alias(session, body.alias or "").generation_id if body.generation is None else body.generation
        return get_generation(session, generation_id).id
    except NotFound as error:
        raise InvalidRequest(str(error), pointer=pointer) from error


def _find_ready(session: Session, reference: str) -> str:
    try:
        _, version = find_version(session, reference)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer="/dataset") from error
    if version.status != "ready":
        message = f"dataset {reference!r} version {version.number} is {version.status}; see job {version.job_id}"
        raise NotReady(message, pointer="/dataset", job_id=version.job_id)
    return version.id


@router.get("/batch-predictions/{job_id}/items", summary="Read a batch prediction", responses=problems(404, 409, 410))
def list_batch_items(job_id: str, services: ServicesDep, page: PageDep) -> Page[BatchItem]:
    """One row for every image, in the dataset's order; 409 until the job has succeeded, 410 when they were removed for their age."""
    cursors = services.cursors
    with services.database.reading() as session:
        job = get_job(session, job_id)
        files = {row.name: row.digest for row in list_files(session, job_id)}
    if job.kind != "predict":
        raise NotFound(f"job {job_id} is no batch prediction")
    if job.status != "succeeded":
        raise NotReady(f"batch prediction {job_id} is {job.status}", status=job.status)
    if "predictions.parquet" not in files:
        message = f"the items of batch prediction {job_id} were removed for their age (NOISY_STUDENT_KEEP_PREDICTIONS_DAYS); predict again"
        given = {name: job.input[key] for name, key in (("generation", "generation_id"), ("dataset", "version_id"))}
        again = {"method": "POST", "path": f"{API}/batch-predictions", "body": given}
        raise Expired(message, setting="NOISY_STUDENT_KEEP_PREDICTIONS_DAYS", make_again=again)
    listing = f"batch-items:{job_id}"
    position = 0 if page.cursor is None else cursors.decode(listing, page.cursor)[0]
    with services.files.reading(files["predictions.parquet"]) as path:
        rows, following = read_rows(path, position=position, limit=page.limit, columns=_COLUMNS)
    items = [_show(row) for row in rows]
    return Page(items=items, next_cursor=None if following is None else cursors.encode(listing, [following]))


@router.delete("/batch-predictions/{job_id}", summary="Delete a batch prediction", status_code=204, responses=problems(404, 409))
def remove_batch_prediction(job_id: str, services: ServicesDep) -> Response:
    """With its job and every item; 409 while it is still made."""
    with services.database.transaction() as session:
        delete_prediction(session, job_id)
    return Response(status_code=204)


def _show(row: dict[str, Any]) -> BatchItem:
    names, probs = row.pop("top_class_names") or [], row.pop("top_probs") or []
    top = [BatchCandidate(label=name, probability=value) for name, value in zip(names, probs, strict=True)]
    return BatchItem(**row, top=top)
