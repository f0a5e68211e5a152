"""Pseudo-label sets: let any generation label any pool, and look at what it guessed and what selection kept."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from core.db.datasets import get_ready_version, get_version
from core.db.deletion import delete_set
from core.db.files import list_files
from core.db.generations import get_generation
from core.db.pseudo_labels import cancel_set, count_shards_done, create_set, get_set, list_first_jobs
from core.db.tables import Generation, PseudoLabelSet
from core.errors import Expired, InvalidRequest, NotFound, NotReady
from ml.config import LabelingConfig, RuntimeConfig, SelectionConfig
from ml.validation import to_dict
from server.dependencies import API, ServicesDep, make_router
from server.idempotency import Answer, OnceDep
from server.job_views import Priority
from server.label_items import ItemFilter, read_items
from server.openapi import problems
from server.pages import Page, PageDep, read_page
from server.pool_images import read_pool_image
from server.recipe_bodies import ShownAs, build_part
from server.run_checks import find_selection_model, refuse_thresholds

router = make_router("pseudo-labels")

MAX_JOBS_SHOWN = 200
_EXAMPLE: dict[str, Any] = {
    "generation": "gen_01m7wgtp77grsvqrmzq6wz5cgs",
    "unlabeled": "flowers-unlabeled",
    "selection": {"min_confidence": 0.5},
    "evaluation": ["flowers-test"],
}
Reference = Annotated[str, Field(min_length=1, max_length=300)]


class SetRequest(BaseModel):
    """A pool to label with a generation, outside of any run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [_EXAMPLE]})

    generation: Annotated[str, Field(min_length=1, max_length=100)]
    unlabeled: Reference
    """`dsv_…`, NAME or NAME:NUMBER of an unlabeled dataset."""
    labeling: Annotated[dict[str, Any], ShownAs(LabelingConfig)] = Field(default_factory=dict)
    selection: Annotated[dict[str, Any], ShownAs(SelectionConfig)] = Field(default_factory=dict)
    runtime: Annotated[dict[str, Any], ShownAs(RuntimeConfig)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Breaks ties and chooses repeats."""
    evaluation: Annotated[list[Reference], Field(max_length=20)] = Field(default_factory=list)
    """Evaluation datasets whose images (and near-duplicates) are kept out of the selection."""
    priority: Priority = 0
    """Of two waiting jobs the one of the higher priority is started first; the set's jobs have it."""
    reuse: bool = True
    """Take labels over that the same network made of the same images under the same runtime; off labels every image anew."""


class SetView(BaseModel):
    """One generation's guesses for one pool, and what selection kept of them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    status: Literal["labeling", "selecting", "ready", "failed", "canceled"]
    run_id: str | None
    iteration: int | None
    generation_id: str
    selection_generation_id: str | None
    """Whose confidences choose, when that is not the generation itself."""
    unlabeled_version_id: str
    labeling: dict[str, Any]
    selection: dict[str, Any]
    seed: int
    num_shards: int
    shards_done: int
    num_images: int
    priority: int
    report: dict[str, Any] | None
    """What selection counted; null until the set is ready."""
    shards_expired_at: datetime | None
    """When its shards were removed for their age: what was selected stays, and no other set can take its labels over any more."""
    items_expired_at: datetime | None
    """When the list of its guesses was removed for its age: `items` answers 410 since."""
    created_at: datetime
    finished_at: datetime | None
    jobs: list[str]
    """Its first 200 jobs."""


class ClassCount(BaseModel):
    """One predicted class, before and after selection."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    predicted: int
    """Images that the generation takes for this class."""
    above_threshold: int
    num_unique: int
    """Different images kept."""
    num_rows: int
    """Rows that a student sees, repeats included."""
    lowest_confidence: float | None
    """Of those kept."""
    best_confidence: float | None


class Counts(BaseModel):
    """How many images each step of the selection left."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    num_pool: int
    num_usable: int | None
    """Images that could be read and labeled."""
    num_eligible: int | None
    """Less those that repeat evaluation images or fall out of the sample."""
    removed_duplicates: dict[str, Any] | None
    target: int | None
    """Rows that each class was filled up or cut down to; null without a cap."""
    num_unique: int
    num_rows: int
    classes: list[ClassCount]


class ClassHistogram(BaseModel):
    """One predicted class's images by confidence."""

    name: str
    counts: list[int]


class ConfidenceHistogram(BaseModel):
    """Eligible images by confidence, before the threshold."""

    edges: list[float]
    """One more than there are bins."""
    classes: list[ClassHistogram]


class LabelItem(BaseModel):
    """One image of the pool and what was guessed."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    key: str
    """Its path below the dataset's folder."""
    status: str
    """`ok`, or why there is no guess."""
    class_name: str | None
    confidence: float | None
    selected: bool
    repeat: int
    """How often a student sees it in one pass."""
    image: str
    """Where the image itself is."""


@router.post("/pseudo-label-sets", summary="Label a pool", status_code=202, response_model=SetView, responses=problems(404, 409, 413, 415))
def create_pseudo_label_set(body: SetRequest, services: ServicesDep, once: OnceDep) -> Response:
    """One labeling job a shard for any free worker, then one that selects. The generation may come from any run, or be imported."""
    labeling = build_part(LabelingConfig, body.labeling, base=LabelingConfig(), pointer="/labeling")
    selection = build_part(SelectionConfig, body.selection, base=SelectionConfig(), pointer="/selection")
    runtime = build_part(RuntimeConfig, body.runtime, base=RuntimeConfig(), pointer="/runtime")
    with services.database.transaction() as session:

        def create() -> Answer:
            generation = _find_generation(session, body.generation)
            refuse_thresholds(selection, generation.class_names, pointer="/selection")
            pool = _ready(session, body.unlabeled, kind="unlabeled", pointer="/unlabeled")
            kept_out = [
                _ready(session, reference, kind="evaluation", pointer=f"/evaluation/{place}").id
                for place, reference in enumerate(body.evaluation)
            ]
            chooser = None
            if labeling.selection_model is not None:
                chooser = find_selection_model(session, labeling.selection_model, None, pointer="/labeling/selection_model")
                if chooser.class_names != generation.class_names:
                    raise InvalidRequest(
                        "the selection model guesses other classes than the generation", pointer="/labeling/selection_model"
                    )
            row = create_set(
                session,
                generation_id=generation.id,
                unlabeled_version_id=pool.id,
                num_images=pool.num_images or 0,
                labeling=to_dict(labeling),
                selection=to_dict(selection),
                seed=body.seed,
                capability="cuda" if runtime.device == "cuda" else "cpu",
                runtime=to_dict(runtime),
                evaluation_version_ids=kept_out,
                selection_generation_id=None if chooser is None else chooser.id,
                priority=body.priority,
                reuse=body.reuse,
            )
            return Answer(_show(session, row), location=f"{API}/pseudo-label-sets/{row.id}")

        return once.run(session, create)


def _find_generation(session: Session, generation_id: str) -> Generation:
    try:
        return get_generation(session, generation_id)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer="/generation") from error


def _ready(session: Session, reference: str, *, kind: str, pointer: str) -> Any:
    try:
        return get_ready_version(session, reference, kind=kind, pointer=pointer)
    except NotFound as error:
        raise InvalidRequest(str(error), pointer=pointer) from error


def _show(session: Session, row: PseudoLabelSet) -> SetView:
    values = {name: getattr(row, name) for name in SetView.model_fields if name not in ("jobs", "shards_done")}
    jobs = list_first_jobs(session, row.id, limit=MAX_JOBS_SHOWN)
    return SetView(**values, shards_done=count_shards_done(session, row), jobs=jobs)


@router.get("/pseudo-label-sets", summary="List pseudo-label sets")
def list_pseudo_label_sets(
    services: ServicesDep,
    page: PageDep,
    run_id: Annotated[str | None, Query(max_length=100, description="Only this run's.")] = None,
    generation_id: Annotated[str | None, Query(max_length=100, description="Only what this generation labeled.")] = None,
) -> Page[SetView]:
    """Newest first."""
    cursors = services.cursors
    query = sa.select(PseudoLabelSet)
    for column, value in ((PseudoLabelSet.run_id, run_id), (PseudoLabelSet.generation_id, generation_id)):
        if value is not None:
            query = query.where(column == value)
    with services.database.reading() as session:
        listing = f"pseudo-label-sets?{run_id}&{generation_id}"
        rows, cursor = read_page(session, query, PseudoLabelSet.id, page, cursors=cursors, listing=listing)
        return Page(items=[_show(session, row) for row in rows], next_cursor=cursor)


@router.get("/pseudo-label-sets/{set_id}", summary="Read a pseudo-label set", responses=problems(404))
def read_pseudo_label_set(set_id: str, services: ServicesDep) -> SetView:
    """Its parameters, how far it is, and selection's report."""
    with services.database.reading() as session:
        return _show(session, get_set(session, set_id))


@router.post("/pseudo-label-sets/{set_id}/cancel", summary="Cancel a pseudo-label set", responses=problems(404, 409))
def cancel_pseudo_label_set(set_id: str, services: ServicesDep) -> SetView:
    """Its waiting jobs are canceled at once, the running ones at their next heartbeat. One of a run is canceled with the run."""
    with services.database.transaction() as session:
        return _show(session, cancel_set(session, set_id))


@router.delete("/pseudo-label-sets/{set_id}", summary="Delete a pseudo-label set", status_code=204, responses=problems(404, 409))
def remove_pseudo_label_set(set_id: str, services: ServicesDep) -> Response:
    """With its jobs and every guess. 409 while it has not ended, and for one of a run: that goes with the run."""
    with services.database.transaction() as session:
        delete_set(session, set_id)
    return Response(status_code=204)


def _report(session: Session, set_id: str) -> dict[str, Any]:
    row = get_set(session, set_id)
    if row.report is None:
        raise NotReady(f"pseudo-label set {set_id} is {row.status}; it can be looked at when it is ready", status=row.status)
    return row.report


@router.get("/pseudo-label-sets/{set_id}/counts", summary="Count per class", responses=problems(404, 409))
def read_label_counts(set_id: str, services: ServicesDep) -> Counts:
    """Before and after selection."""
    with services.database.reading() as session:
        report = _report(session, set_id)
    known: dict[str, Any] = {name: report.get(name) for name in Counts.model_fields if name != "classes"}
    return Counts(**known, classes=[ClassCount(**row) for row in report.get("classes", [])])


@router.get("/pseudo-label-sets/{set_id}/histogram", summary="Confidences per class", responses=problems(404, 409))
def read_label_histogram(set_id: str, services: ServicesDep) -> ConfidenceHistogram:
    """Twenty bins from 0 to 1."""
    with services.database.reading() as session:
        report = _report(session, set_id)
    histogram = report.get("histogram", {"edges": [], "counts": {}})
    # PostgreSQL keeps the keys of an object in an order of its own.
    names = [row["name"] for row in report.get("classes", [])]
    classes = [ClassHistogram(name=name, counts=histogram["counts"][name]) for name in names if name in histogram["counts"]]
    return ConfidenceHistogram(edges=histogram["edges"], classes=classes)


@router.get("/pseudo-label-sets/{set_id}/items", summary="Read guesses", responses=problems(404, 409, 410))
def list_label_items(
    set_id: str,
    *,
    services: ServicesDep,
    page: PageDep,
    class_name: Annotated[str | None, Query(alias="class", max_length=300, description="Only images taken for this class.")] = None,
    min_confidence: Annotated[float | None, Query(ge=0, le=1)] = None,
    max_confidence: Annotated[float | None, Query(ge=0, le=1, description="Below, not at it.")] = None,
    selected: Annotated[bool | None, Query(description="Only those that selection kept, or only those it left out.")] = None,
) -> Page[LabelItem]:
    """Most confident first; images without a guess come last. 410 when the list was removed for its age, with how to make it again."""
    cursors = services.cursors
    with services.database.reading() as session:
        _report(session, set_id)
        digests = {row.name: row.digest for row in list_files(session, set_id)}
        row = get_set(session, set_id)
        class_names = get_generation(session, row.generation_id).class_names
    if "items.parquet" not in digests:
        raise _expired(row)
    if class_name is not None and class_name not in class_names:
        raise InvalidRequest(f"there is no class {class_name!r}; known: {', '.join(class_names[:20])}", parameter="class")
    listing = f"items:{set_id}?{class_name}&{min_confidence}&{max_confidence}&{selected}"
    position = 0 if page.cursor is None else cursors.decode(listing, page.cursor)[0]
    wanted = ItemFilter(class_name=class_name, min_confidence=min_confidence, max_confidence=max_confidence, selected=selected)
    with services.files.reading(digests["items.parquet"]) as path:
        rows, following = read_items(path, class_names, wanted, position=position, limit=page.limit)
    items = [
        LabelItem(**row, selected=row["repeat"] > 0, image=f"{API}/pseudo-label-sets/{set_id}/items/{quote(row['key'])}/image")
        for row in rows
    ]
    return Page(items=items, next_cursor=None if following is None else cursors.encode(listing, [following]))


def _expired(row: PseudoLabelSet) -> Expired:
    """The list of guesses is gone, and this makes the same ones again, in a set of their own."""
    beside = {"evaluation_version_ids", "keep_keys_of_set_id"}
    body = {
        "generation": row.generation_id,
        "unlabeled": row.unlabeled_version_id,
        "labeling": row.labeling,
        "selection": {name: value for name, value in row.selection.items() if name not in beside},
        "seed": row.seed,
        "evaluation": row.selection["evaluation_version_ids"],
    }
    moment = None if row.items_expired_at is None else row.items_expired_at.isoformat(timespec="seconds")
    return Expired(
        f"the guesses of pseudo-label set {row.id} were removed {moment or 'long ago'} for their age (NOISY_STUDENT_KEEP_ITEMS_DAYS); "
        f"what was selected is still there. POST {API}/pseudo-label-sets labels the pool again, with the body in details.make_again",
        expired_at=moment,
        setting="NOISY_STUDENT_KEEP_ITEMS_DAYS",
        make_again={"method": "POST", "path": f"{API}/pseudo-label-sets", "body": body},
    )


@router.get(
    "/pseudo-label-sets/{set_id}/items/{key:path}/image",
    summary="Read a pool image",
    response_class=Response,
    responses=problems(404, 409) | {200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
def read_label_image(set_id: str, key: str, services: ServicesDep) -> Response:
    """The file as it lies in its folder, byte for byte; 409 when it was changed since its dataset version was read."""
    with services.database.reading() as session:
        version = get_version(session, get_set(session, set_id).unlabeled_version_id)
    assert version.manifest_digest is not None
    with services.files.reading(version.manifest_digest) as manifest:
        data, media_type = read_pool_image(manifest, key)
    # What is no image is for saving, never for a browser to make something of.
    headers = {} if media_type.startswith("image/") else {"Content-Disposition": "attachment"}
    return Response(data, media_type=media_type, headers=headers)
