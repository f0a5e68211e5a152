"""Generations: metrics, lineage, files; import your own, compare two, delete what nothing needs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from core.db.datasets import check_folder
from core.db.files import list_files, list_files_of
from core.db.generations import delete_generation, get_generation
from core.db.jobs import NewJob, enqueue
from core.db.tables import Generation, StoredFile
from core.errors import Conflict, FolderRefused, NotFound
from core.ids import new_id
from server.dependencies import ServicesDep, make_router
from server.gate import compare_files
from server.idempotency import Answer, OnceDep
from server.job_views import JobView, accepted_job
from server.openapi import problems
from server.pages import Page, PageDep, read_page

router = make_router("generations")

LONG_METRICS = ("confusion_matrix", "per_class", "reliability", "top_confusions")
"""Left out of lists; reading one generation shows them."""


class FileView(BaseModel):
    """One file of a generation."""

    name: str
    num_bytes: int
    digest: str


class GenerationView(BaseModel):
    """A trained (or imported) network and its place in the lineage."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    role: Literal["teacher", "student", "control", "imported"]
    name: str | None
    run_id: str | None
    iteration: int | None
    teacher_generation_id: str | None
    pseudo_label_set_id: str | None
    architecture: str
    num_parameters: int
    class_names: list[str]
    """In the order of its outputs."""
    digest: str
    """SHA-256 of its weights."""
    metrics: dict[str, Any]
    """What was measured: `validation` chose, `test` only reports. Lists leave the long tables out."""
    lineage: dict[str, Any]
    created_at: datetime
    files: list[FileView]


class ImportRequest(BaseModel):
    """A folder on the server with config.json and model.safetensors, as timm's `local-dir:` reads it."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"folder": "/data/datasets/my-teacher", "name": "my-teacher", "class_names": ["daisy", "rose"]}]},
    )

    folder: Annotated[str, Field(min_length=1, max_length=4096)]
    """Below one of the configured roots."""
    name: Annotated[str, Field(min_length=1, max_length=200)]
    class_names: Annotated[list[Annotated[str, Field(min_length=1, max_length=300)]], Field(min_length=2, max_length=100_000)] | None = None
    """In the order of the outputs; null takes those that config.json names."""


class Comparison(BaseModel):
    """B is the generation of the path, A the one it is compared with; positive differences speak for B."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    a: str
    b: str
    split: Literal["validation", "test"]
    num_images: int
    top1: dict[str, Any]
    """a, b, difference, and the difference's 95 % interval by paired bootstrap."""
    nll: dict[str, Any]
    agreement: float
    mcnemar: dict[str, Any]
    per_class: list[dict[str, Any]]
    regressions: list[dict[str, Any]]


def show_generation(generation: Generation, files: list[StoredFile], *, brief: bool = False) -> GenerationView:
    """`brief` leaves the long tables out."""
    values = {name: getattr(generation, name) for name in GenerationView.model_fields if name != "files"}
    if brief:
        values["metrics"] = {name: _without_tables(value) for name, value in generation.metrics.items()}
    return GenerationView(**values, files=[FileView(name=row.name, num_bytes=row.num_bytes, digest=row.digest) for row in files])


def _without_tables(value: Any) -> Any:
    return {name: inner for name, inner in value.items() if name not in LONG_METRICS} if isinstance(value, Mapping) else value


@router.get("/generations", summary="List generations")
def list_generations(
    services: ServicesDep,
    page: PageDep,
    run_id: Annotated[str | None, Query(max_length=100, description="Only this run's.")] = None,
    role: Annotated[Literal["teacher", "student", "control", "imported"] | None, Query(description="Only these.")] = None,
) -> Page[GenerationView]:
    """Newest first."""
    cursors = services.cursors
    query, listing = sa.select(Generation), f"generations?{run_id}&{role}"
    if run_id is not None:
        query = query.where(Generation.run_id == run_id)
    among = None if role is None or run_id is not None else (Generation.role, role)
    if role is not None and among is None:
        query = query.where(Generation.role == role)
    with services.database.reading() as session:
        rows, cursor = read_page(session, query, Generation.id, page, cursors=cursors, listing=listing, among=among)
        files = list_files_of(session, [row.id for row in rows])
        return Page(items=[show_generation(row, files[row.id], brief=True) for row in rows], next_cursor=cursor)


@router.get("/generations/{generation_id}", summary="Read a generation", responses=problems(404, 409))
def read_generation(generation_id: str, services: ServicesDep) -> GenerationView:
    """Everything that was measured; 409 while a job is still making it."""
    with services.database.reading() as session:
        return show_generation(get_generation(session, generation_id), list_files(session, generation_id))


@router.get(
    "/generations/{generation_id}/files/{name}",
    summary="Download a file",
    response_class=FileResponse,
    responses=problems(404, 409) | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def read_generation_file(generation_id: str, name: str, services: ServicesDep) -> Response:
    """Weights, ONNX, preprocessing, model card: what is needed to use it without this service."""
    with services.database.reading() as session:
        get_generation(session, generation_id)
        digests = {row.name: row.digest for row in list_files(session, generation_id)}
    if name not in digests:
        raise NotFound(f"generation {generation_id} has no file {name!r}; it has {', '.join(digests)}")
    headers = {"ETag": f'"{digests[name]}"'}
    return services.files.send(digests[name], media_type="application/octet-stream", filename=name, headers=headers)


@router.post("/generations/import", summary="Import a network", status_code=202, response_model=JobView, responses=problems(409, 413, 415))
def import_generation(body: ImportRequest, services: ServicesDep, once: OnceDep) -> Response:
    """Bring your own teacher: a job checks the weights (safetensors only), exports them like any generation and registers it."""
    try:
        folder = check_folder(body.folder, services.settings.roots)
    except FolderRefused as error:
        error.details["pointer"] = "/folder"
        raise
    with services.database.transaction() as session:

        def start() -> Answer:
            wanted = NewJob(
                kind="import",
                input={"folder": str(folder), "name": body.name, "class_names": body.class_names},
                generation_id=new_id("generation"),
                max_attempts=services.settings.max_attempts,
            )
            [job] = enqueue(session, [wanted])
            return accepted_job(session, job, services.settings)

        return once.run(session, start)


@router.get("/generations/{generation_id}/compare", summary="Compare two generations", responses=problems(404, 409))
def compare_generations(
    generation_id: str,
    services: ServicesDep,
    other: Annotated[str, Query(alias="with", max_length=100, description="The generation to compare with.")],
    split: Annotated[Literal["validation", "test"], Query(description="`validation` may choose; `test` only reports.")] = "validation",
) -> Comparison:
    """Image by image, so that what both find easy or hard cancels. 409 when the two were measured on different images."""
    name, files = f"{split}_predictions.parquet", services.serving.generation_files
    with files(other, name) as a_files, files(generation_id, name) as b_files:
        compared = compare_files(a_files, b_files, name)
    if isinstance(compared, str):
        raise Conflict(f"generation {generation_id} cannot be compared with {other}: {compared}")
    return Comparison(a=other, b=generation_id, split=split, **compared)


@router.delete("/generations/{generation_id}", summary="Delete a generation", status_code=204, responses=problems(404, 409))
def remove_generation(generation_id: str, services: ServicesDep) -> Response:
    """409 with the referrers while an alias, a run, another generation, a pseudo-label set or a job needs it."""
    with services.database.transaction() as session:
        delete_generation(session, generation_id)
    services.serving.predictor.forget(generation_id)
    return Response(status_code=204)
