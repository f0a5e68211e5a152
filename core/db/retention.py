"""What goes by itself when it is old, by the settings `keep_…_days`, and what keeps everything else.

Only what can be made again or is of no use any more ever goes: shards and lists of guesses, checkpoints of trainings that came to
nothing, old answers and signs of workers. Never a generation, a selection, a manifest, a report, or an event: those go when
somebody deletes what they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from core.db.disk_use import Use, kind_of_file
from core.db.reuse import SHARD
from core.db.session import now
from core.db.tables import Alias, Generation, IdempotencyRecord, Iteration, Job, Promotion, PseudoLabelSet, Run, StoredFile, Worker
from core.lifecycle import JOB_TERMINAL, PHASE_TERMINAL
from core.settings import Settings

CHECKPOINT = "checkpoint-"
ITEMS = "items.parquet"
PREDICTIONS = "predictions.parquet"
_ROWS_ONLY = {"synchronize_session": False}
MOST_SETS = 10
"""Sets whose files go in one transaction: each may have tens of thousands of shards."""
Files = Any
"""`StoredFile`, or an alias of it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that goes when it is old: files by their names, whole rows, or the files of pseudo-label sets that a mark speaks of."""

    what: str
    setting: str
    files: Callable[[Files, datetime], sa.ColumnElement[bool]] | None = None
    rows: Callable[[datetime], tuple[type[Any], sa.ColumnElement[bool]]] | None = None
    mark: str | None = None
    """Column of the pseudo-label sets that says when these files of theirs went."""


@dataclass(frozen=True, slots=True)
class Expired:
    """What one rule takes."""

    what: str
    setting: str
    days: float
    num: int
    """Files or rows."""
    freed_bytes: int
    """Of files that nothing else names."""

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def plus(self, other: Expired | None) -> Expired:
        """Both together."""
        return self if other is None else replace(self, num=self.num + other.num, freed_bytes=self.freed_bytes + other.freed_bytes)


@dataclass(frozen=True, slots=True)
class _Due:
    """A rule that is switched on, at this moment."""

    rule: Rule
    days: float
    old: datetime
    sets: sa.ColumnElement[bool] | None
    """Which pseudo-label sets a rule with a mark takes from."""

    def files(self, files: Files) -> sa.ColumnElement[bool]:
        if self.rule.mark is not None and self.sets is not None:
            return _of_sets(files, self.rule.mark, self.sets)
        return sa.false() if self.rule.files is None else self.rule.files(files, self.old)


def find_expired(session: Session, settings: Settings) -> list[Expired]:
    """What `expire` would take now, rule by rule; rules that take nothing are left out."""
    return _look(session, _due(session, settings, now(session), most_sets=None))


def expire(session: Session, settings: Settings, *, most_sets: int = MOST_SETS) -> tuple[list[Expired], bool]:
    """Take what is old by the settings, of so many sets at most; returns what it took, and whether there may be more."""
    moment = now(session)
    due = _due(session, settings, moment, most_sets=most_sets)
    found = _look(session, due)
    taking = {one.what for one in found}
    num_marked = 0
    for one in due:
        if one.rule.mark is not None and one.sets is not None:
            # Also sets that have no such file: nobody needs to look at them again.
            marked = sa.update(PseudoLabelSet).where(one.sets).values({one.rule.mark: moment})
            num_marked += len(session.scalars(marked.returning(PseudoLabelSet.id), execution_options=_ROWS_ONLY).all())
        if one.rule.what in taking and one.rule.rows is None:
            session.execute(sa.delete(StoredFile).where(one.files(StoredFile)), execution_options=_ROWS_ONLY)
        elif one.rule.what in taking and one.rule.rows is not None:
            table, where = one.rule.rows(one.old)
            session.execute(sa.delete(table).where(where), execution_options=_ROWS_ONLY)
    return found, bool(found) or num_marked > 0


def _due(session: Session, settings: Settings, moment: datetime, *, most_sets: int | None) -> list[_Due]:
    due = []
    for rule in RULES:
        days = getattr(settings, rule.setting)
        if days is None:
            continue
        old, sets = moment - timedelta(days=days), None
        if rule.mark is not None:
            sets = sa.and_(getattr(PseudoLabelSet, rule.mark).is_(None), _finished_sets(old))
            if most_sets is not None:
                sets = PseudoLabelSet.id.in_(list(session.scalars(sa.select(PseudoLabelSet.id).where(sets).limit(most_sets))))
        due.append(_Due(rule, days, old, sets))
    return due


def _look(session: Session, due: list[_Due]) -> list[Expired]:
    other = aliased(StoredFile)
    stays = sa.exists().where(other.digest == StoredFile.digest, sa.not_(sa.or_(sa.false(), *(one.files(other) for one in due))))
    found = []
    for one in due:
        num = freed = 0
        if one.rule.rows is not None:
            num = _count(session, *one.rule.rows(one.old))
        elif num := _count(session, StoredFile, one.files(StoredFile)):
            contents = sa.select(StoredFile.digest, sa.func.max(StoredFile.num_bytes).label("num_bytes"))
            contents = contents.where(one.files(StoredFile), ~stays).group_by(StoredFile.digest)
            freed = int(session.scalar(sa.select(sa.func.sum(contents.subquery().c.num_bytes))) or 0)
        if num:
            found.append(Expired(one.rule.what, one.rule.setting, one.days, num, freed))
    return found


def _count(session: Session, table: type[Any], where: sa.ColumnElement[bool]) -> int:
    return session.scalar(sa.select(sa.func.count()).select_from(table).where(where)) or 0


def _finished_sets(old: datetime) -> sa.ColumnElement[bool]:
    """Sets whose guesses no job will ask for again: selection is over, and their iteration too; or their run never goes on."""
    iteration_over = sa.exists().where(
        Iteration.run_id == PseudoLabelSet.run_id,
        Iteration.number == PseudoLabelSet.iteration,
        Iteration.phase.in_(PHASE_TERMINAL),
        Iteration.finished_at < old,
    )
    in_use = sa.exists().where(Job.pseudo_label_set_id == PseudoLabelSet.id, Job.status.in_(("queued", "running")))
    run_over = sa.exists().where(Run.id == PseudoLabelSet.run_id, Run.status == "canceled")
    made = sa.and_(PseudoLabelSet.status == "ready", sa.or_(PseudoLabelSet.run_id.is_(None), iteration_over))
    given_up = sa.and_(PseudoLabelSet.status.in_(("failed", "canceled")), run_over)
    return sa.and_(sa.or_(made, given_up), PseudoLabelSet.finished_at < old, ~in_use)


def _of_sets(files: Files, mark: str, which: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """The files that the mark speaks of, of these sets."""
    sets = sa.select(PseudoLabelSet.id).where(which)
    if mark == "items_expired_at":
        return sa.and_(files.name == ITEMS, files.owner_id.in_(sets))
    jobs = sa.select(Job.id).where(Job.pseudo_label_set_id.in_(sets), Job.kind == "label")
    return sa.and_(files.name == SHARD, files.owner_id.in_(jobs))


def _old_checkpoints(files: Files, old: datetime) -> sa.ColumnElement[bool]:
    jobs = sa.select(Job.id).where(Job.kind == "train", Job.status.in_(("failed", "canceled")), Job.finished_at < old)
    return sa.and_(files.name.startswith(CHECKPOINT, autoescape=True), files.owner_id.in_(jobs))


def _old_predictions(files: Files, old: datetime) -> sa.ColumnElement[bool]:
    jobs = sa.select(Job.id).where(Job.kind == "predict", Job.status.in_(JOB_TERMINAL), Job.finished_at < old)
    return sa.and_(files.name == PREDICTIONS, files.owner_id.in_(jobs))


def _old_answers(old: datetime) -> tuple[type[Any], sa.ColumnElement[bool]]:
    return IdempotencyRecord, IdempotencyRecord.created_at < old


def _old_workers(old: datetime) -> tuple[type[Any], sa.ColumnElement[bool]]:
    """One that still holds a job says who held it, however long it was silent."""
    holds = sa.exists().where(Job.lease_holder == Worker.name, Job.status == "running")
    return Worker, sa.and_(Worker.seen_at < old, ~holds)


RULES = (
    Rule("shards of guesses", "keep_shards_days", mark="shards_expired_at"),
    Rule("lists of guesses", "keep_items_days", mark="items_expired_at"),
    Rule("checkpoints of failed and canceled trainings", "keep_checkpoints_days", files=_old_checkpoints),
    Rule("batch predictions", "keep_predictions_days", files=_old_predictions),
    Rule("answers to idempotency keys", "keep_answers_days", rows=_old_answers),
    Rule("workers that are gone", "keep_workers_days", rows=_old_workers),
)

KEPT_BY = {
    "manifests": "their dataset versions",
    "images": "their dataset versions",
    "shards": "their pseudo-label sets, or keep_shards_days",
    "items": "their pseudo-label sets, or keep_items_days",
    "selections": "their pseudo-label sets",
    "checkpoints": "their jobs, or keep_checkpoints_days",
    "predictions": "their batch predictions, or keep_predictions_days",
    "logs": "their jobs",
    "other": "their owners",
}


def measure_kept(session: Session) -> list[tuple[str, str, Use]]:
    """What stays and what keeps it: (kind of files, what keeps them, how much), each content once a line."""
    kind = kind_of_file().label("kind")
    keeper = sa.case(
        (kind_of_file() != "generations", ""),
        (StoredFile.owner_id.in_(sa.select(Alias.generation_id)), "an alias"),
        (StoredFile.owner_id.in_(sa.select(Promotion.generation_id)), "the history of an alias"),
        (StoredFile.owner_id.in_(_taught()), "a generation or set that they made"),
        (StoredFile.owner_id.in_(_of_runs()), "their runs"),
        else_="nothing: they may be deleted",
    ).label("keeper")
    contents = sa.select(kind, keeper, StoredFile.digest, sa.func.max(StoredFile.num_bytes).label("num_bytes"))
    contents = contents.group_by(kind, keeper, StoredFile.digest)
    columns = contents.subquery().c
    query = sa.select(columns.kind, columns.keeper, sa.func.count(), sa.func.sum(columns.num_bytes)).group_by(columns.kind, columns.keeper)
    found = session.execute(query.order_by(columns.kind, columns.keeper))
    return [(kind, keeper or KEPT_BY[kind], Use(num_files, int(num_bytes))) for kind, keeper, num_files, num_bytes in found]


def _taught() -> sa.CompoundSelect[Any]:
    columns = (Generation.teacher_generation_id, PseudoLabelSet.generation_id, PseudoLabelSet.selection_generation_id)
    return sa.union(*(sa.select(column).where(column.is_not(None)) for column in columns))


def _of_runs() -> sa.CompoundSelect[Any]:
    columns = (Iteration.generation_id, Iteration.control_generation_id, Run.initial_generation_id)
    return sa.union(*(sa.select(column).where(column.is_not(None)) for column in columns))
