"""The invariants of rows and stored files, checked over the whole database: `noisy-student doctor --verify`.

Reads one snapshot, so it may run beside a working service. Each check yields a Defect per thing that is wrong; a sound service
yields none, whatever was killed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.session import Database
from core.db.tables import (
    Alias,
    DatasetVersion,
    Event,
    Generation,
    Iteration,
    Job,
    Promotion,
    PseudoLabelSet,
    Run,
    StoredFile,
)
from core.errors import StorageError
from core.lifecycle import JOB_MOVES, JOB_TERMINAL
from core.storage import Storage

STATUS_AFTER = {
    "queued": "queued",
    "started": "running",
    "retrying": "queued",
    "interrupted": "queued",
    "succeeded": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
}
"""The status that a job has after each event that moves it; other events tell what happens inside an attempt."""

# Housekeeping sweeps now and then, not at the very second.
SWEEP_SLACK_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that must never be."""

    check: str
    subject: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


def find_defects(database: Database, storage: Storage, *, orphan_seconds: float) -> list[Defect]:
    """Every defect, in the order of the checks. Stored files are read whole, to compare their digests."""
    with database.reading() as session:
        if not database.is_sqlite:
            # One snapshot for all queries; SQLite's transaction is one anyway.
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        defects = [Defect(check.__name__.removeprefix("_").replace("_", " "), *found) for check in CHECKS for found in check(session)]
        files = {row.digest: row for row in session.scalars(sa.select(StoredFile))}
    defects += [Defect("referenced files", *found) for found in _damaged_files(database, storage, files)]
    defects += [Defect("stored files", *found) for found in _orphans(database, storage, orphan_seconds)]
    return defects


def count_rows(database: Database) -> dict[str, int]:
    """How much was looked at."""
    tables = {"jobs": Job, "events": Event, "runs": Run, "generations": Generation, "promotions": Promotion, "stored files": StoredFile}
    with database.reading() as session:
        return {name: session.scalar(sa.select(sa.func.count()).select_from(table)) or 0 for name, table in tables.items()}


Found = Iterator[tuple[str, str]]


def _leases(session: Session) -> Found:
    """One live lease per running job, none elsewhere."""
    for job in session.scalars(sa.select(Job).where((Job.status == "running") != Job.lease_holder.is_not(None))):
        yield job.id, f"is {job.status} and its lease is held by {job.lease_holder or 'nobody'}"
    for job in session.scalars(sa.select(Job).where(Job.lease_holder.is_(None) != Job.lease_until.is_(None))):
        yield job.id, "has half a lease: holder and end go together"


def _job_histories(session: Session) -> Found:
    """Moves as the table allows them, tokens strictly rising, terminal final, the row where its history ended."""
    query = (
        sa.select(Event.job_id, Event.number, Event.kind, Event.data)
        .where(Event.kind.in_(STATUS_AFTER))
        .order_by(Event.job_id, Event.number)
        .execution_options(yield_per=1000)
    )
    jobs = {
        job_id: (status, token, num)
        for job_id, status, token, num in session.execute(sa.select(Job.id, Job.status, Job.token, Job.num_events))
    }
    seen = set()
    for job_id, events in groupby(session.execute(query), key=lambda row: row[0]):
        seen.add(job_id)
        status, token, last = None, 0, 0
        for _, number, kind, data in events:
            yield from ((job_id, problem) for problem in _wrong_move(status, token, number, kind, data))
            status, last = STATUS_AFTER[kind], number
            token = max(token, data.get("token") or 0)
        if job_id not in jobs:
            continue
        row_status, row_token, num_events = jobs[job_id]
        if row_status != status:
            yield job_id, f"is {row_status}, but its last move was to {status}"
        if row_token != token:
            yield job_id, f"has token {row_token}, but its last start had {token}"
        if row_status in JOB_TERMINAL and last != num_events:
            yield job_id, f"is {row_status} since event {last}, but {num_events - last} events follow"
    for job_id in jobs.keys() - seen:
        yield job_id, "has no history at all"


def _wrong_move(status: str | None, token: int, number: int, kind: str, data: dict[str, Any]) -> Iterator[str]:
    new = STATUS_AFTER[kind]
    if status is None:
        if kind != "queued":
            yield f"begins with {kind!r} instead of 'queued'"
    elif new not in JOB_MOVES[status]:
        yield f"went from {status} to {new} in event {number}"
    elif status in JOB_TERMINAL and not data.get("retry"):
        yield f"left the final status {status} in event {number} though nobody asked for a retry"
    if kind == "started" and data.get("token", 0) <= token:
        yield f"was started with token {data.get('token')} in event {number}, after token {token}"


def _event_numbers(session: Session) -> Found:
    """Without gaps per job and per run: numbers are unique, so first, last and count tell it. A run's newest may not have theirs yet."""
    per_job = sa.select(Event.job_id, sa.func.min(Event.number), sa.func.max(Event.number), sa.func.count()).group_by(Event.job_id)
    yield from _gaps(session, per_job, sa.select(Job.id, Job.num_events))
    per_run = sa.select(Event.run_id, sa.func.min(Event.run_number), sa.func.max(Event.run_number), sa.func.count(Event.run_number))
    per_run = per_run.where(Event.run_number.is_not(None)).group_by(Event.run_id)
    yield from _gaps(session, per_run, sa.select(Run.id, Run.num_events))
    yield from _passed_over(session)
    foreign = sa.select(Event.job_id, Event.number).join(Job, Job.id == Event.job_id).where(Event.run_id.is_distinct_from(Job.run_id))
    for job_id, number in session.execute(foreign):
        yield job_id, f"event {number} belongs to another run than its job"


def _passed_over(session: Session) -> Found:
    """A job's events are numbered in their run in the job's order: none without a number comes before one that has its own."""
    has_none = Event.run_number.is_(None)
    first_without = sa.func.min(sa.case((has_none, Event.number)))
    last_with = sa.func.max(sa.case((sa.not_(has_none), Event.number)))
    of_runs = sa.select(Event.job_id, first_without, last_with).where(Event.run_id.is_not(None)).group_by(Event.job_id)
    for job_id, first, last in session.execute(of_runs.having(first_without < last_with)):
        yield job_id, f"event {first} has no number in its run, but event {last} has"


def _gaps(session: Session, counted: sa.Executable, expected: sa.Executable) -> Found:
    found = {owner: (low, high, count) for owner, low, high, count in session.execute(counted)}
    for owner, num_events in session.execute(expected):
        low, high, count = found.pop(owner, (1, 0, 0))
        if (low, high, count) != (1, num_events, num_events):
            yield owner, f"counts {num_events} events, but has {count}, numbered {low} to {high}"
    for owner in found:
        yield owner, "has events, but no row"


def _generations(session: Session) -> Found:
    """A train or import job succeeded exactly when one generation names it, whose digest is that of its weights."""
    makers = sa.select(Job.id, Job.status, Job.generation_id).where(Job.kind.in_(("train", "import")))
    jobs = {job_id: (status, generation_id) for job_id, status, generation_id in session.execute(makers)}
    weights = sa.select(StoredFile.owner_id, StoredFile.digest).where(StoredFile.name == "model.safetensors")
    digest_of = dict(session.execute(weights).all())
    made: dict[str, list[str]] = defaultdict(list)
    for generation in session.scalars(sa.select(Generation)):
        made[generation.job_id].append(generation.id)
        status, generation_id = jobs.get(generation.job_id, (None, None))
        if status != "succeeded" or generation_id != generation.id:
            yield generation.id, f"comes from job {generation.job_id}, which is {status or 'not there'} and names {generation_id}"
        if digest_of.get(generation.id) != generation.digest:
            yield generation.id, f"has digest {generation.digest}, its weights have {digest_of.get(generation.id, 'no file')}"
    for job_id, (status, generation_id) in jobs.items():
        # A generation that was deleted took its name out of the job.
        if status == "succeeded" and generation_id is not None and made[job_id] != [generation_id]:
            yield job_id, f"succeeded in making {generation_id}, but there is {', '.join(made[job_id]) or 'nothing'}"


def _lineage(session: Session) -> Found:
    """Every teacher, set and student that something names is there, and nobody teaches an ancestor."""
    teachers = dict(session.execute(sa.select(Generation.id, Generation.teacher_generation_id)).all())
    sets = set(session.scalars(sa.select(PseudoLabelSet.id)))
    for generation_id, teacher in teachers.items():
        if teacher is not None and teacher not in teachers:
            yield generation_id, f"names the teacher {teacher}, which is not there"
    for generation_id, set_id in session.execute(sa.select(Generation.id, Generation.pseudo_label_set_id)):
        if set_id is not None and set_id not in sets:
            yield generation_id, f"names the pseudo-label set {set_id}, which is not there"
    for generation_id in _in_cycles(teachers):
        yield generation_id, "is its own ancestor"
    for row in session.scalars(sa.select(Iteration)):
        for column in ("generation_id", "teacher_generation_id", "control_generation_id"):
            named = getattr(row, column)
            if named is not None and named not in teachers:
                yield f"{row.run_id} iteration {row.number}", f"names {named} as {column}, which is not there"
        if row.phase == "done" and row.generation_id is None:
            yield f"{row.run_id} iteration {row.number}", "is done without a generation"


def _in_cycles(teachers: dict[str, str | None]) -> list[str]:
    sound: set[str] = set()
    cyclic: set[str] = set()
    for start in teachers:
        path: list[str] = []
        here: str | None = start
        while here is not None and here not in sound and here not in cyclic and here not in path:
            path.append(here)
            here = teachers.get(here)
        if here is not None and here in path:
            cyclic.update(path[path.index(here) :])
            path = path[: path.index(here)]
        sound.update(path)
    return sorted(cyclic)


def _aliases(session: Session) -> Found:
    """Replaying its history gives what an alias points at."""
    moves: dict[str, list[Promotion]] = defaultdict(list)
    for move in session.scalars(sa.select(Promotion).order_by(Promotion.alias, Promotion.version)):
        moves[move.alias].append(move)
    aliases = {alias.name: alias for alias in session.scalars(sa.select(Alias))}
    for name, history in moves.items():
        yield from ((f"alias {name}", problem) for problem in _replay(history))
        alias, last = aliases.get(name), history[-1]
        if alias is None:
            yield f"alias {name}", "has a history, but no row"
        elif (alias.generation_id, alias.version) != (last.generation_id, last.version):
            points, ends = (f"{one.generation_id} (version {one.version})" for one in (alias, last))
            yield f"alias {name}", f"points at {points}, but its history ends at {ends}"
    for name in aliases.keys() - moves.keys():
        yield f"alias {name}", "has no history"


def _replay(history: list[Promotion]) -> Iterator[str]:
    stack: list[str] = []
    current = None
    for number, move in enumerate(history, start=1):
        if move.version != number:
            yield f"has version {move.version} as its move number {number}"
        if move.previous_generation_id != current:
            yield f"came from {move.previous_generation_id} in version {move.version}, but pointed at {current}"
        if move.action == "promote":
            stack.append(move.generation_id)
        else:
            stack = stack[:-1]
            if stack[-1:] != [move.generation_id]:
                yield f"was rolled back to {move.generation_id} in version {move.version}, but {(stack or ['nothing'])[-1]} came before"
        current = move.generation_id


def _files_of_rows(session: Session) -> Found:
    """What is ready has its files."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for row in session.scalars(sa.select(StoredFile)):
        names[row.owner_id][row.name] = row.digest
    for version in session.scalars(sa.select(DatasetVersion).where(DatasetVersion.status == "ready")):
        if names[version.id].get("manifest.parquet") != version.manifest_digest:
            yield version.id, "is ready, but its manifest is not the file that it names"
    for set_id in session.scalars(sa.select(PseudoLabelSet.id).where(PseudoLabelSet.status == "ready")):
        if "selected.parquet" not in names[set_id]:
            yield set_id, "is ready, but has no selected.parquet"


def _runs(session: Session) -> Found:
    """A completed or canceled run has nothing left to do; in a failed one, what waits may wait for a retry."""
    query = sa.select(Job.id, Job.status, Run.id, Run.status).join(Run, Run.id == Job.run_id)
    # An attempt of a canceled run that knows of the wish may still be stopping.
    stopping = sa.and_(Run.status == "canceled", Job.status == "running", Job.cancel_requested_at.is_not(None))
    unfinished = query.where(Run.status.in_(("completed", "canceled")), Job.status.not_in(JOB_TERMINAL), sa.not_(stopping))
    for job_id, status, run_id, run_status in session.execute(unfinished):
        yield job_id, f"is {status}, but its run {run_id} is {run_status}"


def _damaged_files(database: Database, storage: Storage, files: dict[str, StoredFile]) -> Found:
    for digest, row in files.items():
        try:
            storage.verify(digest)
        except StorageError as error:
            # Its owner may have been deleted since the snapshot was taken.
            with database.reading() as session:
                still = session.scalar(sa.select(StoredFile.owner_id).where(StoredFile.digest == digest).limit(1))
            if still is not None:
                yield f"{row.owner_id} {row.name}", error.message


def _orphans(database: Database, storage: Storage, orphan_seconds: float) -> Found:
    with database.reading() as session:
        named = set(session.scalars(sa.select(StoredFile.digest).distinct()))
    for digest in storage.list_old(older_than_seconds=orphan_seconds + SWEEP_SLACK_SECONDS, now_seconds=time.time()):
        if digest not in named:
            yield digest, "is named by no row and should have been swept"


CHECKS: tuple[Callable[[Session], Found], ...] = (
    _leases,
    _job_histories,
    _event_numbers,
    _generations,
    _lineage,
    _aliases,
    _files_of_rows,
    _runs,
)
