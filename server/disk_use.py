"""How much storage runs, generations, pseudo-label sets and datasets use, and what deleting them would free."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, ConfigDict

from core.db import disk_use
from core.db.datasets import find_version
from core.db.disk_use import Use
from core.db.generations import get_generation
from core.db.pseudo_labels import get_set
from core.db.runs import get_run
from server.dependencies import ServicesDep, make_router
from server.openapi import problems

router = make_router("disk-use")


class KindUse(BaseModel):
    """Files of one kind."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: str
    """`manifests`, `images` (packed ones), `shards` (every guess, as it was labeled), `items` (every guess by confidence), `selections`,
    `generations`, `checkpoints`, `predictions`, `logs` or `other`."""
    num_files: int
    num_bytes: int


class OwnerUse(BaseModel):
    """What one generation, set or run uses by itself."""

    id: str
    num_files: int
    num_bytes: int


class DiskUse(BaseModel):
    """What something uses. A file that several need counts once."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    num_files: int
    num_bytes: int
    shared_bytes: int
    """Of files that something else needs too."""
    freed_bytes: int
    """What deleting it would free, once the grace period of the sweep is over."""


class RunDiskUse(DiskUse):
    """What a run uses, by kinds of files, generations and pseudo-label sets; these may share files."""

    kinds: list[KindUse]
    generations: list[OwnerUse]
    pseudo_label_sets: list[OwnerUse]


class RunUse(OwnerUse):
    """One run of the list."""

    name: str
    status: str


class WholeDiskUse(BaseModel):
    """What all rows need. Files that nobody needs any more are not counted; the sweep removes them."""

    num_files: int
    num_bytes: int
    kinds: list[KindUse]
    runs: list[RunUse]


def _show(row_id: str, use: Use) -> DiskUse:
    return DiskUse(id=row_id, num_files=use.num_files, num_bytes=use.num_bytes, shared_bytes=use.shared_bytes, freed_bytes=use.freed_bytes)


def _kinds(found: dict[str, Use]) -> list[KindUse]:
    return [KindUse(kind=kind, num_files=use.num_files, num_bytes=use.num_bytes) for kind, use in found.items()]


def _owners(found: dict[str, Use]) -> list[OwnerUse]:
    return [OwnerUse(id=row_id, num_files=use.num_files, num_bytes=use.num_bytes) for row_id, use in sorted(found.items())]


@router.get("/disk-use", summary="Measure the storage in use")
def read_disk_use(
    services: ServicesDep, limit: Annotated[int, Query(ge=1, le=1000, description="Runs to list, the largest first.")] = 50
) -> WholeDiskUse:
    """In all, by kinds of files, and by run. Sums over every row that names a file: seconds, where there are millions."""
    with services.database.reading() as session:
        total = disk_use.measure_all(session)
        runs = [
            RunUse(id=run.id, name=run.name, status=run.status, num_files=use.num_files, num_bytes=use.num_bytes)
            for run, use in disk_use.measure_runs(session, limit=limit)
        ]
        return WholeDiskUse(num_files=total.num_files, num_bytes=total.num_bytes, kinds=_kinds(disk_use.measure_kinds(session)), runs=runs)


@router.get("/runs/{run_id}/disk-use", summary="Measure what a run uses", responses=problems(404))
def read_run_disk_use(run_id: str, services: ServicesDep) -> RunDiskUse:
    """Its jobs, sets and generations together, and each of them."""
    with services.database.reading() as session:
        get_run(session, run_id)
        owners = disk_use.owners_of_run(run_id)
        return RunDiskUse(
            **_show(run_id, disk_use.measure(session, owners)).model_dump(),
            kinds=_kinds(disk_use.measure_kinds(session, owners)),
            generations=_owners(disk_use.measure_generations(session, run_id)),
            pseudo_label_sets=_owners(disk_use.measure_sets(session, run_id)),
        )


@router.get("/generations/{generation_id}/disk-use", summary="Measure what a generation uses", responses=problems(404, 409))
def read_generation_disk_use(generation_id: str, services: ServicesDep) -> DiskUse:
    """Its exported files; 409 while a job is still making it."""
    with services.database.reading() as session:
        get_generation(session, generation_id)
        return _show(generation_id, disk_use.measure(session, disk_use.owners_of_generation(generation_id)))


@router.get("/pseudo-label-sets/{set_id}/disk-use", summary="Measure what a pseudo-label set uses", responses=problems(404))
def read_set_disk_use(set_id: str, services: ServicesDep) -> DiskUse:
    """What was selected, every guess by confidence, and the shards as they were labeled."""
    with services.database.reading() as session:
        get_set(session, set_id)
        return _show(set_id, disk_use.measure(session, disk_use.owners_of_set(set_id)))


@router.get("/dataset-versions/{version_id}/disk-use", summary="Measure what a dataset version uses", responses=problems(404))
def read_version_disk_use(version_id: str, services: ServicesDep) -> DiskUse:
    """Its manifest, and images that are stored on its behalf; images that lie where they always lay are not counted."""
    with services.database.reading() as session:
        version = find_version(session, version_id)[1]
        return _show(version.id, disk_use.measure(session, disk_use.owners_of_version(version.id)))
