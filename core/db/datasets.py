"""Datasets and their immutable versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.files import list_files, name_files
from core.db.jobs import NewJob, enqueue
from core.db.session import now
from core.db.tables import Dataset, DatasetVersion, Job
from core.errors import AlreadyExists, FolderRefused, InvalidRequest, NotFound, NotReady
from core.ids import absent, new_id
from core.settings import S3

SHARD = "shard-"
"""How the names of files of packed images begin."""


def check_folder(folder: str, roots: tuple[Path, ...]) -> Path:
    """Resolve a folder that a request names; FolderRefused unless it is a directory below a root, links followed."""
    path = _below_roots(folder, roots, what="folder", pointer="/source/folder")
    if not path.is_dir():
        raise FolderRefused(f"folder {folder!r} does not exist or is not a folder", pointer="/source/folder")
    return path


def check_source(text: str, roots: tuple[Path, ...]) -> Path:
    """Resolve a folder, a file or a pattern of shards that a request names; FolderRefused unless it lies below a root, links followed."""
    path = _below_roots(text, roots, what="path", pointer="/source/path")
    # Whether all files of a pattern are there is for the job to find; it looks at links again.
    if not path.exists() and not ("{" in path.name and path.parent.is_dir()):
        raise FolderRefused(f"path {text!r} does not exist", pointer="/source/path")
    return path


def check_address(address: str, roots: tuple[str, ...]) -> str:
    """`s3://…` that a request names; FolderRefused unless it lies below a root. Whether anything is there is for the job to find."""
    if not any(address == root or address.startswith(f"{root}/") for root in roots):
        allowed = ", ".join(roots) or "there are none in S3"
        message = f"{address!r} lies outside the configured roots ({allowed}); NOISY_STUDENT_DATASET_ROOTS names them"
        raise FolderRefused(message, pointer="/source/path", roots=allowed)
    return address


def _below_roots(text: str, roots: tuple[Path, ...], *, what: str, pointer: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        advice = "; `path` takes addresses in S3" if what == "folder" and text.startswith(S3) else ""
        raise FolderRefused(f"{what} {text!r} must be an absolute path{advice}", pointer=pointer)
    path = path.resolve()
    if not any(path == root or root in path.parents for root in roots):
        allowed = ", ".join(str(root) for root in roots)
        raise FolderRefused(f"{what} {text!r} lies outside the configured roots ({allowed})", pointer=pointer, roots=allowed)
    return path


def create_dataset(session: Session, *, name: str, kind: str) -> Dataset:
    """Insert a dataset without versions; AlreadyExists when the name is taken. One whose versions all came to nothing does not take it."""
    before = session.scalars(sa.select(Dataset).where(Dataset.name == name)).one_or_none()
    if before is not None:
        usable = sa.select(DatasetVersion.id).where(DatasetVersion.dataset_id == before.id, DatasetVersion.status != "failed")
        if before.kind == kind and session.scalar(usable.limit(1)) is None:
            return before
        message = f"a dataset named {name!r} exists; add a version to it (`datasets add --new-version`), or choose another name"
        raise AlreadyExists(message, pointer="/name")
    dataset = Dataset(id=new_id("dataset"), name=name, kind=kind, last_number=0, created_at=now(session))
    session.add(dataset)
    session.flush()
    return dataset


def add_version(session: Session, dataset: Dataset, *, source: dict[str, Any], ingest: bool = True) -> tuple[DatasetVersion, Job | None]:
    """Insert the dataset's next version as pending, and the job that reads its source (unless another job will fill it).

    `source` has a `folder`, or a `path` with `format` and `split`.
    """
    # Held: were the newest version deleted between these two looks, its number would be given again.
    held = sa.select(Dataset.last_number).where(Dataset.id == dataset.id).with_for_update(key_share=True)
    last_number = session.scalar(held)
    if last_number is None:
        raise absent("dataset", dataset.id)
    number = session.scalar(
        sa.select(sa.func.coalesce(sa.func.max(DatasetVersion.number), 0)).where(DatasetVersion.dataset_id == dataset.id)
    )
    version = DatasetVersion(
        id=new_id("dataset_version"),
        dataset_id=dataset.id,
        number=max(number or 0, last_number) + 1,
        status="pending",
        source=source,
        created_at=now(session),
    )
    session.add(version)
    session.flush()
    if not ingest:
        return version, None
    wanted = NewJob(kind="ingest", input={"version_id": version.id, "kind": dataset.kind, **source})
    version.job_id = wanted.id
    [job] = enqueue(session, [wanted])
    return version, job


def get_dataset(session: Session, dataset_id: str) -> Dataset:
    """By id or by name; NotFound when there is none."""
    dataset = session.get(Dataset, dataset_id) or session.scalar(sa.select(Dataset).where(Dataset.name == dataset_id))
    if dataset is None:
        raise absent("dataset", dataset_id)
    return dataset


def get_version(session: Session, version_id: str) -> DatasetVersion:
    """NotFound when there is none."""
    version = session.get(DatasetVersion, version_id, populate_existing=True)
    if version is None:
        raise absent("dataset version", version_id)
    return version


def hold_version(session: Session, version_id: str) -> None:
    """Keep a version from being deleted until the transaction ends that begins to need it; NotFound when it is gone."""
    held = sa.select(DatasetVersion.id).where(DatasetVersion.id == version_id).with_for_update(read=True, key_share=True)
    if session.scalar(held) is None:
        raise absent("dataset version", version_id)


def source_of(session: Session, version_id: str) -> dict[str, Any]:
    """From what the version's images were read, also when it was cut from another one."""
    source = get_version(session, version_id).source
    while "split_of" in source:
        source = get_version(session, source["split_of"]).source
    return source


def find_version(session: Session, reference: str) -> tuple[Dataset, DatasetVersion]:
    """Resolve `dsv_…`, `NAME` (its latest version) or `NAME:NUMBER`; NotFound when there is none."""
    if reference.startswith("dsv_"):
        version = get_version(session, reference)
        return get_dataset(session, version.dataset_id), version
    name, _, number = reference.partition(":")
    dataset = get_dataset(session, name)
    query = sa.select(DatasetVersion).where(DatasetVersion.dataset_id == dataset.id).order_by(DatasetVersion.number.desc()).limit(1)
    if number:
        if not number.isdecimal():
            raise InvalidRequest(f"dataset {reference!r} must be an id, a name, or NAME:NUMBER")
        query = query.where(DatasetVersion.number == int(number))
    found = session.scalar(query)
    if found is None:
        raise NotFound(f"dataset {name!r} has no version {number or 'yet'}")
    return dataset, found


def get_ready_version(session: Session, reference: str, *, kind: str, pointer: str) -> DatasetVersion:
    """A version that a run can use; InvalidRequest for another kind, NotReady while it is being read or after that failed."""
    dataset, version = find_version(session, reference)
    if dataset.kind != kind:
        raise InvalidRequest(f"dataset {reference!r} is {dataset.kind}; {pointer} needs one that is {kind}", pointer=pointer)
    if version.status != "ready":
        raise NotReady(
            f"dataset {reference!r} version {version.number} is {version.status}; see job {version.job_id}",
            pointer=pointer,
            job_id=version.job_id,
        )
    return version


def finish_version(
    session: Session,
    version_id: str,
    *,
    manifest: dict[str, Any],
    report: dict[str, Any],
    shards: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Make the version ready. `manifest`: digest, num_bytes, num_images, num_usable, class_names; `shards`: files of packed images."""
    version = get_version(session, version_id)
    version.status = "ready"
    version.manifest_digest = manifest["digest"]
    version.num_images = manifest["num_images"]
    version.num_usable = manifest["num_usable"]
    version.class_names = manifest["class_names"]
    version.report = report
    named = {"manifest.parquet": {"digest": manifest["digest"], "num_bytes": manifest["num_bytes"]}}
    name_files(session, version_id, named | (shards or {}))


def list_shards(session: Session, version_id: str) -> dict[str, dict[str, Any]]:
    """The files of a version's packed images: name → {digest, num_bytes}."""
    files = [row for row in list_files(session, version_id) if row.name.startswith(SHARD)]
    return {row.name: {"digest": row.digest, "num_bytes": row.num_bytes} for row in files}


def fail_version(session: Session, version_id: str) -> None:
    """Mark the version failed; its job holds the error. Nothing happens to one that was deleted meanwhile."""
    query = sa.update(DatasetVersion).where(DatasetVersion.id == version_id).values(status="failed")
    session.execute(query, execution_options={"synchronize_session": "fetch"})
