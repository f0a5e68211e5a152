"""Datasets: folders, shards and lists of images on the server, read by jobs into immutable versions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from core.db import datasets as rows
from core.db.jobs import NewJob, enqueue
from core.db.tables import Dataset, DatasetVersion, Job
from core.errors import InvalidRequest, NotReady
from ml.errors import MlError
from ml.manifest import check_shares_fit
from server.dependencies import Services, ServicesDep, make_router
from server.idempotency import OnceDep
from server.job_views import JobView, accepted_job
from server.manifest_rows import read_rows
from server.openapi import problems
from server.pages import Page, PageDep, PageQuery, read_page
from server.run_checks import list_leakage
from server.sources import STRICT, SourceOfImages, check_source

router = make_router("datasets")

Kind = Literal["labeled", "unlabeled", "evaluation"]
# No colon, which stands between name and version number, and none of the prefixes of ids.
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^(?!ds_|dsv_)[A-Za-z0-9][A-Za-z0-9._-]*$")]
Part = Literal["labeled", "validation", "test", "unlabeled"]
Share = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1, le=10**9)] | Literal["rest"]
KIND_OF_PART: dict[str, str] = {"labeled": "labeled", "validation": "evaluation", "test": "evaluation", "unlabeled": "unlabeled"}
IMAGE_COLUMNS = ("key", "digest", "class_name", "status", "bytes", "width", "height")


class NewVersion(BaseModel):
    """A further reading of a source into an existing dataset."""

    model_config = STRICT | {"json_schema_extra": {"examples": [{"source": {"folder": "/data/flowers-more/unlabeled"}}]}}

    source: SourceOfImages


class NewDataset(BaseModel):
    """A dataset to register."""

    model_config = STRICT | {
        "json_schema_extra": {"examples": [{"name": "flowers", "kind": "labeled", "source": {"folder": "/data/flowers/labeled"}}]}
    }

    name: Name
    kind: Kind
    """labeled and evaluation images have classes; unlabeled ones need none."""
    source: SourceOfImages


class NewSplit(BaseModel):
    """How to cut one folder of classes into datasets of their own."""

    model_config = STRICT | {
        "json_schema_extra": {
            "examples": [
                {"shares": {"labeled": 200, "validation": 0.1, "test": 0.1, "unlabeled": "rest"}, "seed": 0, "name_prefix": "mine"}
            ]
        }
    }

    shares: Annotated[dict[Part, Share], Field(min_length=1)]
    """Of each class: a share below 1, a whole number of images, or `rest` for one part."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Equal seeds cut equally."""
    name_prefix: Name | None = None
    """The new datasets are called `<prefix>-labeled` and so on; default: the dataset's name."""

    @model_validator(mode="after")
    def _check_shares(self) -> NewSplit:
        if sum(share for share in self.shares.values() if isinstance(share, float)) > 1 + 1e-9:
            raise ValueError("the shares must be at most 1 together")
        if sum(share == "rest" for share in self.shares.values()) > 1:
            raise ValueError("only one part can be the rest")
        return self


class VersionView(BaseModel):
    """An immutable reading of a source."""

    id: str
    dataset_id: str
    number: int
    status: str
    """pending, ready or failed; the job tells why."""
    source: dict[str, Any]
    num_images: int | None
    num_usable: int | None
    """Images that can be decoded."""
    class_names: list[str] | None
    report: dict[str, Any] | None
    """Undecodable files, duplicates, class histogram, sizes."""
    job_id: str | None
    created_at: datetime


class DatasetView(BaseModel):
    """A named collection of images."""

    id: str
    name: str
    kind: str
    created_at: datetime
    latest_version: VersionView | None


class LeakView(BaseModel):
    """One image that two versions share."""

    key: str
    other_key: str
    by: str
    """`file`: the same bytes; `pixels`: the same picture in another file."""


class LeakageView(BaseModel):
    """What two versions share; empty is good."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    num: int
    """Images of the larger version that are also in the other."""
    items: list[LeakView]
    """The first 100."""


class ImageView(BaseModel):
    """One file of a version."""

    key: str
    """Path below the source's folder, name of the tar member, or what the list or the Parquet file calls it."""
    digest: str
    class_name: str | None
    status: str
    """`ok`, or why the file is no image."""
    bytes: int
    width: int | None
    height: int | None


def _show_version(version: DatasetVersion) -> VersionView:
    return VersionView(**{name: getattr(version, name) for name in VersionView.model_fields})


def _show_datasets(session: Session, found: Sequence[Dataset]) -> list[DatasetView]:
    newest = sa.select(sa.func.max(DatasetVersion.id)).where(DatasetVersion.dataset_id.in_([one.id for one in found]))
    latest = session.scalars(sa.select(DatasetVersion).where(DatasetVersion.id.in_(newest.group_by(DatasetVersion.dataset_id))))
    by_dataset = {version.dataset_id: _show_version(version) for version in latest}
    return [
        DatasetView(id=one.id, name=one.name, kind=one.kind, created_at=one.created_at, latest_version=by_dataset.get(one.id))
        for one in found
    ]


@router.post("/datasets", status_code=202, summary="Register a dataset", response_model=JobView, responses=problems(409, 415))
def create_dataset(body: NewDataset, services: ServicesDep, once: OnceDep) -> Response:
    """Starts the job that reads the source: every image gets a row and every oddity a line in the version's report."""
    source = check_source(body.source, services.settings)
    with services.database.transaction() as session:

        def work() -> Job:
            dataset = rows.create_dataset(session, name=body.name, kind=body.kind)
            return _ingest(session, dataset, source)

        return once.run(session, lambda: accepted_job(session, work(), services.settings))


def _ingest(session: Session, dataset: Dataset, source: dict[str, Any]) -> Job:
    _, job = rows.add_version(session, dataset, source=source)
    assert job is not None
    return job


@router.get("/datasets", summary="List datasets")
def list_datasets(services: ServicesDep, page: PageDep, kind: Kind | None = None) -> Page[DatasetView]:
    """Newest first, each with its latest version."""
    cursors = services.cursors
    query = sa.select(Dataset) if kind is None else sa.select(Dataset).where(Dataset.kind == kind)
    with services.database.reading() as session:
        found, cursor = read_page(session, query, Dataset.id, page, cursors=cursors, listing=f"datasets?{kind}")
        return Page(items=_show_datasets(session, found), next_cursor=cursor)


@router.get("/datasets/{dataset_id}", summary="Read a dataset", responses=problems(404))
def get_dataset(dataset_id: str, services: ServicesDep) -> DatasetView:
    """By id or by name."""
    with services.database.reading() as session:
        return _show_datasets(session, [rows.get_dataset(session, dataset_id)])[0]


@router.post(
    "/datasets/{dataset_id}/versions",
    status_code=202,
    summary="Read a source into a new version",
    response_model=JobView,
    responses=problems(404, 409, 415),
)
def create_dataset_version(dataset_id: str, body: NewVersion, services: ServicesDep, once: OnceDep) -> Response:
    """Earlier versions stay as they are; runs keep the version they started with."""
    source = check_source(body.source, services.settings)
    with services.database.transaction() as session:
        return once.run(
            session,
            lambda: accepted_job(session, _ingest(session, rows.get_dataset(session, dataset_id), source), services.settings),
        )


@router.get("/datasets/{dataset_id}/versions", summary="List a dataset's versions", responses=problems(404))
def list_dataset_versions(dataset_id: str, services: ServicesDep, page: PageDep) -> Page[VersionView]:
    """Newest first."""
    cursors = services.cursors
    with services.database.reading() as session:
        dataset = rows.get_dataset(session, dataset_id)
        query = sa.select(DatasetVersion).where(DatasetVersion.dataset_id == dataset.id)
        found, cursor = read_page(session, query, DatasetVersion.id, page, cursors=cursors, listing=f"versions?{dataset.id}")
        return Page(items=[_show_version(version) for version in found], next_cursor=cursor)


@router.post(
    "/datasets/{dataset_id}/splits",
    status_code=202,
    summary="Cut one folder into labeled, validation, test and unlabeled",
    response_model=JobView,
    responses=problems(404, 409, 415),
)
def split_dataset(dataset_id: str, body: NewSplit, services: ServicesDep, once: OnceDep) -> Response:
    """Makes a dataset per part from the latest version. Equal pixels stay in one part, so that nothing leaks."""
    with services.database.transaction() as session:
        return once.run(session, lambda: accepted_job(session, _split(session, dataset_id, body), services.settings))


def _split(session: Session, dataset_id: str, body: NewSplit) -> Job:
    dataset, source = rows.find_version(session, dataset_id)
    if dataset.kind == "unlabeled":
        raise InvalidRequest(f"dataset {dataset.name!r} is unlabeled; only folders of classes can be split", pointer="/shares")
    if source.status != "ready":
        raise NotReady(f"dataset {dataset.name!r} is {source.status}; see job {source.job_id}", job_id=source.job_id)
    try:
        # What is refused here takes no names. Equal images make fewer different ones; the job counts those.
        check_shares_fit((source.report or {}).get("classes", {}), dict(body.shares.items()))
    except MlError as error:
        raise InvalidRequest(str(error), pointer="/shares", **error.details) from error
    rows.hold_version(session, source.id)
    prefix = body.name_prefix or dataset.name
    targets: dict[str, Any] = {}
    versions: list[DatasetVersion] = []
    for part, share in body.shares.items():
        made = rows.create_dataset(session, name=f"{prefix}-{part}", kind=KIND_OF_PART[part])
        origin = {"split_of": source.id, "part": part, "share": share, "seed": body.seed}
        version, _ = rows.add_version(session, made, source=origin, ingest=False)
        targets[part] = {"version_id": version.id, "share": share}
        versions.append(version)
    wanted = NewJob(kind="split", input={"source_version_id": source.id, "targets": targets, "seed": body.seed})
    for version in versions:
        version.job_id = wanted.id
    [job] = enqueue(session, [wanted])
    return job


@router.get("/dataset-versions/{version_id}", summary="Read a version with its report", responses=problems(404))
def get_dataset_version(version_id: str, services: ServicesDep) -> VersionView:
    """By id `dsv_…`, by dataset name (its latest version), or by `NAME:NUMBER`."""
    with services.database.reading() as session:
        return _show_version(rows.find_version(session, version_id)[1])


@router.get("/dataset-versions/{version_id}/images", summary="List a version's files", responses=problems(404, 409))
def list_dataset_images(
    version_id: str,
    services: ServicesDep,
    page: PageDep,
    status: Annotated[str | None, Query(max_length=40, description="`ok`, or the reason that you look for.")] = None,
) -> Page[ImageView]:
    """Every file by its key, the broken ones with the reason."""
    with services.database.reading() as session:
        version = rows.find_version(session, version_id)[1]
        if version.status != "ready":
            raise NotReady(f"dataset version {version.id} is {version.status}; see job {version.job_id}", job_id=version.job_id)
    listing = f"images?{version.id}&{status}"
    position, equal = _position(services, listing, page), None if status is None else {"status": status}
    assert version.manifest_digest is not None
    with services.files.reading(version.manifest_digest) as path:
        found, after = read_rows(path, position=position, limit=page.limit, columns=IMAGE_COLUMNS, equal=equal)
    cursor = None if after is None else services.cursors.encode(listing, [after])
    return Page(items=[ImageView(**row) for row in found], next_cursor=cursor)


@router.get("/dataset-versions/{version_id}/leakage", summary="Find the images of another version", responses=problems(404, 409))
def read_leakage(
    version_id: str,
    services: ServicesDep,
    reference: Annotated[str, Query(alias="with", max_length=300, description="`dsv_…`, a dataset's name, or NAME:NUMBER.")],
) -> LeakageView:
    """Images that sit in both versions, by file or by pixels: what `POST /runs` refuses as `leakage`, asked before."""
    with services.database.reading() as session:
        found = {"other_key": rows.find_version(session, reference)[1], "key": rows.find_version(session, version_id)[1]}
    for version in found.values():
        if version.status != "ready":
            raise NotReady(f"dataset version {version.id} is {version.status}; see job {version.job_id}", job_id=version.job_id)
    # The smaller one is held in memory; the larger one is read in pieces.
    small, large = sorted(found, key=lambda side: found[side].num_images or 0)
    num, keys = list_leakage(services.files, {small: found[small]}, {large: found[large]})
    return LeakageView(num=num, items=[LeakView(**{small: one["key"], large: one["other_key"]}, by=one["by"]) for one in keys])


def _position(services: Services, listing: str, page: PageQuery) -> int:
    return 0 if page.cursor is None else int(services.cursors.decode(listing, page.cursor)[0])
