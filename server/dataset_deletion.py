"""Deleting datasets and their versions, when nothing needs them any more."""

from __future__ import annotations

from fastapi import Response

from core.db.datasets import find_version
from core.db.deletion import delete_dataset, delete_version
from server.dependencies import ServicesDep, make_router
from server.openapi import problems

router = make_router("datasets")


@router.delete("/datasets/{dataset_id}", summary="Delete a dataset", status_code=204, responses=problems(404, 409))
def remove_dataset(dataset_id: str, services: ServicesDep) -> Response:
    """With all its versions; by id or by name. Images stay, but those that were packed go. 409 with the referrers of what is needed."""
    with services.database.transaction() as session:
        delete_dataset(session, dataset_id)
    return Response(status_code=204)


@router.delete("/dataset-versions/{version_id}", summary="Delete a dataset version", status_code=204, responses=problems(404, 409))
def remove_dataset_version(version_id: str, services: ServicesDep) -> Response:
    """Its manifest and report, and images that were packed for it; others stay where they are. Its number is not given again.

    409 with the referrers while a run, a pseudo-label set, a job or a version that was cut from it needs it.
    """
    with services.database.transaction() as session:
        delete_version(session, find_version(session, version_id)[1].id)
    return Response(status_code=204)
