"""Deleting what has ended and nothing else needs: runs, pseudo-label sets, dataset versions, batch predictions.

A deletion is one transaction: rows, their jobs with every event, and what named their files. The files themselves go by the
sweep, after its grace period, and only those that nobody else names. What something needs is refused, with the referrers.
"""

from __future__ import annotations

from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.datasets import get_dataset, get_version
from core.db.generations import list_referrers_of
from core.db.jobs import get_job
from core.db.pseudo_labels import get_set
from core.db.runs import get_run
from core.db.tables import Dataset, DatasetVersion, Event, Generation, Iteration, Job, OutboxMessage, PseudoLabelSet, Run, StoredFile
from core.errors import NotFound, StillReferenced, WrongState
from core.ids import absent
from core.lifecycle import JOB_TERMINAL, RUN_ENDED, SET_ENDED

Row = TypeVar("Row", Run, PseudoLabelSet)
_ROWS_ONLY = {"synchronize_session": False}
Ids = sa.Select[str]
"""A query for the ids of rows."""


def delete_run(session: Session, run_id: str) -> list[str]:
    """Remove a run that has ended with its iterations, sets, jobs, events and generations; the ids of those generations.

    WrongState for one that has not ended or whose last attempt is still stopping; StillReferenced lists who else needs a generation.
    """
    _check_ended("run", get_run(session, run_id), RUN_ENDED)
    jobs = sa.select(Job.id).where(Job.run_id == run_id)
    _hold_jobs(session, Job.run_id == run_id)
    _check_ended("run", _hold(session, Run, run_id, noun="run"), RUN_ENDED)
    _refuse_attempts(session, f"run {run_id}", Job.run_id == run_id)
    sets = sa.select(PseudoLabelSet.id).where(PseudoLabelSet.run_id == run_id)
    generations = sa.select(Generation.id).where(Generation.run_id == run_id)
    # Held, so that whoever begins to need one of them is seen, or finds nothing.
    made = list(session.scalars(generations.order_by(Generation.id).with_for_update()))
    _refuse_referrers(f"run {run_id}", list_referrers_of(session, generations, outside_run=run_id))
    _forget_files(session, sets, generations)
    _delete(session, Iteration, Iteration.run_id == run_id)
    _delete(session, PseudoLabelSet, PseudoLabelSet.run_id == run_id)
    _delete(session, Generation, Generation.run_id == run_id)
    _delete_jobs(session, jobs)
    _delete(session, Run, Run.id == run_id)
    return made


def delete_set(session: Session, set_id: str) -> None:
    """Remove a pseudo-label set of its own that has ended, with its jobs; one that belongs to a run goes with the run."""
    row = get_set(session, set_id)
    if row.run_id is not None:
        _refuse_referrers(f"pseudo-label set {set_id}", [f"run {row.run_id}"])
    of_set = Job.pseudo_label_set_id == set_id
    _hold_jobs(session, of_set)
    _check_ended("pseudo-label set", _hold(session, PseudoLabelSet, set_id, noun="pseudo-label set"), SET_ENDED)
    _refuse_attempts(session, f"pseudo-label set {set_id}", of_set)
    trained = session.scalars(sa.select(Generation.id).where(Generation.pseudo_label_set_id == set_id))
    _refuse_referrers(f"pseudo-label set {set_id}", [f"generation {found}" for found in trained])
    _forget_files(session, sa.select(PseudoLabelSet.id).where(PseudoLabelSet.id == set_id))
    _delete(session, PseudoLabelSet, PseudoLabelSet.id == set_id)
    _delete_jobs(session, sa.select(Job.id).where(of_set))


def delete_version(session: Session, version_id: str) -> None:
    """Remove a dataset version that no run, set, job or other version needs; its number is not given again."""
    version = get_version(session, version_id)
    _delete_versions(session, f"dataset version {version_id}", DatasetVersion.id == version_id)
    remember = sa.update(Dataset).where(Dataset.id == version.dataset_id, Dataset.last_number < version.number)
    session.execute(remember.values(last_number=version.number), execution_options=_ROWS_ONLY)


def delete_dataset(session: Session, dataset_id: str) -> None:
    """Remove a dataset, by id or name, with all its versions, if nothing needs one of them."""
    dataset = get_dataset(session, dataset_id)
    _delete_versions(session, f"dataset {dataset.name!r}", DatasetVersion.dataset_id == dataset.id)
    _delete(session, Dataset, Dataset.id == dataset.id)


def delete_prediction(session: Session, job_id: str) -> None:
    """Remove a batch prediction that has ended, with what it predicted."""
    if get_job(session, job_id).kind != "predict":
        raise NotFound(f"job {job_id} is no batch prediction")
    _hold_jobs(session, Job.id == job_id)
    job = get_job(session, job_id)
    if job.status not in JOB_TERMINAL:
        raise WrongState(f"batch prediction {job_id} is {job.status}; cancel it before you delete it", status=job.status)
    _delete_jobs(session, sa.select(Job.id).where(Job.id == job_id))


def list_version_referrers(session: Session, versions: Ids) -> list[str]:
    """Every row that needs one of these dataset versions, as `kind id`."""
    ids = list(session.scalars(versions))
    columns = (Run.labeled_version_id, Run.unlabeled_version_id, Run.validation_version_id, Run.test_version_id)
    runs = sa.union(
        sa.select(Run.id).where(sa.or_(*(column.in_(versions) for column in columns))),
        sa.select(Iteration.run_id).where(Iteration.unlabeled_version_id.in_(versions)),
    )
    referrers = [f"run {found}" for found in session.scalars(runs)]
    kept_out = _names_any(PseudoLabelSet.selection, ids)
    sets = sa.select(PseudoLabelSet.id).where(sa.or_(PseudoLabelSet.unlabeled_version_id.in_(versions), kept_out))
    referrers += [f"pseudo-label set {found}" for found in session.scalars(sets)]
    # What was cut from it refers to its report, and to images that are stored on its behalf.
    cut = sa.select(DatasetVersion.id).where(_names_any(DatasetVersion.source, ids), DatasetVersion.id.not_in(versions))
    referrers += [f"dataset version {found}" for found in session.scalars(cut)]
    open_jobs = sa.select(Job.id).where(Job.status.in_(("queued", "running")), Job.kind.in_(("ingest", "split", "predict")))
    return referrers + [f"job {found}" for found in session.scalars(open_jobs.where(_names_any(Job.input, ids)))]


def _names_any(column: Any, ids: list[str]) -> sa.ColumnElement[bool]:
    """Whether the JSON of a column names one of these ids somewhere."""
    text = sa.cast(column, sa.Text)
    return sa.or_(sa.false(), *(text.contains(f'"{found}"', autoescape=True) for found in ids))


def _delete_versions(session: Session, what: str, which: sa.ColumnElement[bool]) -> None:
    _hold_jobs(session, Job.id.in_(sa.select(DatasetVersion.job_id).where(which)))
    # Held, so that no run begins with it meanwhile: its foreign key waits for this transaction, and then finds nothing.
    locked = session.scalars(sa.select(DatasetVersion).where(which).order_by(DatasetVersion.id).with_for_update())
    readers = {version.job_id for version in locked if version.job_id is not None}
    versions = sa.select(DatasetVersion.id).where(which)
    _refuse_referrers(what, list_version_referrers(session, versions))
    _forget_files(session, versions)
    _delete(session, DatasetVersion, which)
    # A split fills several versions: its history stays until the last of them goes.
    done = sa.select(Job.id).where(
        Job.id.in_(readers), Job.id.not_in(sa.select(DatasetVersion.job_id).where(DatasetVersion.job_id.in_(readers)))
    )
    _delete_jobs(session, sa.select(Job.id).where(Job.id.in_(list(session.scalars(done)))))


def _check_ended(noun: str, row: Run | PseudoLabelSet, ended: tuple[str, ...]) -> None:
    if row.status not in ended:
        raise WrongState(f"{noun} {row.id} is {row.status}; cancel it, or wait for its end, before you delete it", status=row.status)


def _hold(session: Session, table: type[Row], row_id: str, *, noun: str) -> Row:
    """The row, kept from others until the transaction ends; NotFound when somebody else deleted it meanwhile."""
    row = session.get(table, row_id, with_for_update=True, populate_existing=True)
    if row is None:
        raise absent(noun, row_id)
    return row


def _hold_jobs(session: Session, which: sa.ColumnElement[bool]) -> None:
    """Lock what a retry, a cancellation or a report may write, in their order: jobs first, then the run or set."""
    session.execute(sa.select(Job.id).where(which, Job.status != "succeeded").order_by(Job.id).with_for_update())


def _refuse_attempts(session: Session, what: str, which: sa.ColumnElement[bool]) -> None:
    running = list(session.scalars(sa.select(Job.id).where(which, Job.status == "running").limit(100)))
    if running:
        raise WrongState(f"job {running[0]} of {what} is still being stopped; try again in a moment", jobs=running)


def _refuse_referrers(what: str, referrers: list[str]) -> None:
    if referrers:
        more = f" and {len(referrers) - 5} more" if len(referrers) > 5 else ""
        raise StillReferenced(f"{what} is needed by {', '.join(referrers[:5])}{more}", referrers=referrers[:1000])


def _forget_files(session: Session, *owners: Ids) -> None:
    for ids in owners:
        _delete(session, StoredFile, StoredFile.owner_id.in_(ids))


def _delete_jobs(session: Session, jobs: Ids) -> None:
    _forget_files(session, jobs)
    _delete(session, OutboxMessage, OutboxMessage.job_id.in_(jobs))
    _delete(session, Event, Event.job_id.in_(jobs))
    _delete(session, Job, Job.id.in_(jobs))


def _delete(session: Session, table: type[Any], where: sa.ColumnElement[bool]) -> None:
    session.execute(sa.delete(table).where(where), execution_options=_ROWS_ONLY)
