"""Every table. Names of constraints follow one convention, so that migrations can speak of them on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from core import lifecycle
from core.version import PROTOCOL

Json = sa.JSON().with_variant(JSONB(), "postgresql")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Aware UTC on both databases; SQLite keeps no zone, so it is put back on reading."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value}: every time is aware UTC")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """All rows."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: Json, list[str]: Json, str: sa.Text}  # noqa: RUF012  SQLAlchemy's own attribute


def _one_of(column: str, words: tuple[str, ...]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(word) for word in words)})", name=column)


class Dataset(Base):
    """A named collection of images; its content lives in versions."""

    __tablename__ = "datasets"
    __table_args__ = (_one_of("kind", ("labeled", "unlabeled", "evaluation")),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    last_number: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    """The highest number of a version that was deleted: no number is given twice."""
    created_at: Mapped[datetime]


class DatasetVersion(Base):
    """An immutable reading of a source: manifest and report."""

    __tablename__ = "dataset_versions"
    __table_args__ = (
        sa.UniqueConstraint("dataset_id", "number"),
        _one_of("status", lifecycle.VERSION_STATUSES),
        sa.Index("ix_dataset_versions_status", "status"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    dataset_id: Mapped[str] = mapped_column(sa.ForeignKey("datasets.id"))
    number: Mapped[int]
    status: Mapped[str]
    source: Mapped[dict[str, Any]]
    job_id: Mapped[str | None] = mapped_column(index=True)
    manifest_digest: Mapped[str | None]
    num_images: Mapped[int | None]
    num_usable: Mapped[int | None]
    class_names: Mapped[list[str] | None]
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class Run(Base):
    """Datasets, a recipe, and the chain of iterations made with them."""

    __tablename__ = "runs"
    __table_args__ = (_one_of("status", lifecycle.RUN_STATUSES), sa.Index("ix_runs_status", "status", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    status: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    iterations_wanted: Mapped[int]
    labeled_version_id: Mapped[str] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    unlabeled_version_id: Mapped[str] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    validation_version_id: Mapped[str | None] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    test_version_id: Mapped[str | None] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    initial_generation_id: Mapped[str | None]
    runtime: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    stop_reason: Mapped[str | None]
    num_events: Mapped[int] = mapped_column(default=0)
    priority: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class Iteration(Base):
    """Teacher, pseudo-labels, student, once; number 0 makes the first teacher."""

    __tablename__ = "iterations"
    __table_args__ = (sa.UniqueConstraint("run_id", "number"), _one_of("phase", lifecycle.PHASES))

    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(sa.ForeignKey("runs.id"))
    number: Mapped[int]
    phase: Mapped[str]
    plan: Mapped[dict[str, Any]]
    teacher_generation_id: Mapped[str | None]
    generation_id: Mapped[str | None]
    control_generation_id: Mapped[str | None]
    pseudo_label_set_id: Mapped[str | None]
    unlabeled_version_id: Mapped[str | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


_OPEN = sa.text("status IN ('queued', 'running')")


class Job(Base):
    """What was asked for. The row is the truth; a Celery message only wakes somebody who then claims it."""

    __tablename__ = "jobs"
    __table_args__ = (
        sa.UniqueConstraint("run_id", "iteration", "step", "part"),
        _one_of("status", lifecycle.JOB_STATUSES),
        _one_of("kind", lifecycle.JOB_KINDS),
        sa.CheckConstraint("(lease_holder IS NULL) = (lease_until IS NULL)", name="lease"),
        sa.CheckConstraint("(status = 'running') = (lease_holder IS NOT NULL)", name="lease_while_running"),
        sa.Index("ix_jobs_open", "run_id", "id", sqlite_where=_OPEN, postgresql_where=_OPEN),
        sa.Index("ix_jobs_status", "status", "id"),
        sa.Index("ix_jobs_kind", "kind", "id"),
        sa.Index("ix_jobs_lease_until", "lease_until"),
        sa.Index("ix_jobs_run_id", "run_id", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str]
    capability: Mapped[str]
    priority: Mapped[int] = mapped_column(default=0)
    protocol: Mapped[int] = mapped_column(default=PROTOCOL, server_default=sa.text("1"))
    run_id: Mapped[str | None] = mapped_column(sa.ForeignKey("runs.id"))
    iteration: Mapped[int | None]
    step: Mapped[str | None]
    part: Mapped[int | None]
    pseudo_label_set_id: Mapped[str | None]
    generation_id: Mapped[str | None] = mapped_column(index=True)
    input: Mapped[dict[str, Any]]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    progress: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(default=0)
    lost_attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    token: Mapped[int] = mapped_column(default=0)
    lease_holder: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    hinted_at: Mapped[datetime | None]
    num_events: Mapped[int] = mapped_column(default=0)
    reuse_key: Mapped[str | None] = mapped_column(index=True)
    """Of a labeled shard: jobs with the same one make the same bytes."""
    reuse_dataset_key: Mapped[str | None] = mapped_column(index=True)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


def is_open(job: type[Job]) -> sa.ColumnElement[bool]:
    """Queued or running, in the words of ix_jobs_open: a parameter could mean anything, and would not be looked for there."""
    return job.status.in_([sa.literal_column("'queued'"), sa.literal_column("'running'")])


# In the order of a claim, which so reads one row, however long the queue is.
sa.Index("ix_jobs_claim", Job.status, Job.capability, Job.priority.desc(), Job.id)
sa.Index("ix_jobs_set", Job.pseudo_label_set_id, Job.status, Job.priority.desc(), Job.id)


class Event(Base):
    """One thing that happened to a job: the live stream, the audit trail and the test oracle. Numbers have no gaps."""

    __tablename__ = "events"
    __table_args__ = (sa.Index("ix_events_run", "run_id", "run_number", unique=True),)

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str | None]
    run_number: Mapped[int | None]
    attempt: Mapped[int]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class PseudoLabelSet(Base):
    """One generation's guesses for one pool, and what selection kept of them."""

    __tablename__ = "pseudo_label_sets"
    __table_args__ = (_one_of("status", lifecycle.SET_STATUSES),)

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    run_id: Mapped[str | None] = mapped_column(sa.ForeignKey("runs.id"), index=True)
    iteration: Mapped[int | None]
    generation_id: Mapped[str] = mapped_column(sa.ForeignKey("generations.id"), index=True)
    selection_generation_id: Mapped[str | None]
    unlabeled_version_id: Mapped[str] = mapped_column(sa.ForeignKey("dataset_versions.id"))
    labeling: Mapped[dict[str, Any]]
    selection: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(sa.BigInteger)
    num_shards: Mapped[int]
    num_images: Mapped[int]
    priority: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    held_job_id: Mapped[str | None]
    """The labeling job that waits until all others of the set are written; None once they are, and nothing is selected before."""
    report: Mapped[dict[str, Any] | None]
    shards_expired_at: Mapped[datetime | None]
    items_expired_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


sa.Index(
    "ix_pseudo_label_sets_unwritten",
    PseudoLabelSet.held_job_id,
    sqlite_where=PseudoLabelSet.held_job_id.is_not(None),
    postgresql_where=PseudoLabelSet.held_job_id.is_not(None),
)


class Generation(Base):
    """A trained (or imported) network in the lineage. Registered only when complete."""

    __tablename__ = "generations"
    __table_args__ = (_one_of("role", lifecycle.GENERATION_ROLES), sa.Index("ix_generations_role", "role", "id"))

    id: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    name: Mapped[str | None]
    run_id: Mapped[str | None] = mapped_column(sa.ForeignKey("runs.id"), index=True)
    iteration: Mapped[int | None]
    job_id: Mapped[str] = mapped_column(unique=True)
    teacher_generation_id: Mapped[str | None] = mapped_column(index=True)
    pseudo_label_set_id: Mapped[str | None]
    architecture: Mapped[str]
    num_parameters: Mapped[int] = mapped_column(sa.BigInteger)
    class_names: Mapped[list[str]]
    digest: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    lineage: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class StoredFile(Base):
    """Who needs which stored file. A file that no row here names may be removed once it is old."""

    __tablename__ = "stored_files"
    __table_args__ = (sa.Index("ix_stored_files_digest", "digest"),)

    owner_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(sa.BigInteger)


class Alias(Base):
    """A name that points at a generation; `version` is its ETag."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(primary_key=True)
    generation_id: Mapped[str] = mapped_column(sa.ForeignKey("generations.id"), index=True)
    version: Mapped[int]
    updated_at: Mapped[datetime]


class Promotion(Base):
    """One move of an alias; replaying them gives the current alias."""

    __tablename__ = "promotions"
    __table_args__ = (_one_of("action", ("promote", "rollback")), sa.UniqueConstraint("alias", "version"))

    id: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str]
    version: Mapped[int]
    action: Mapped[str]
    generation_id: Mapped[str]
    previous_generation_id: Mapped[str | None]
    forced: Mapped[bool]
    reason: Mapped[str | None]
    gate: Mapped[dict[str, Any] | None]
    actor: Mapped[str | None]
    created_at: Mapped[datetime]


class OutboxMessage(Base):
    """A hint to publish, written in the transaction that made its job."""

    __tablename__ = "outbox"
    __table_args__ = (sa.Index("ix_outbox_published_at", "published_at", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str]
    queue: Mapped[str]
    created_at: Mapped[datetime]
    published_at: Mapped[datetime | None]


class IdempotencyRecord(Base):
    """The answer that a repeated request gets again."""

    __tablename__ = "idempotency_records"

    key: Mapped[str] = mapped_column(primary_key=True)
    api_key_id: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    status_code: Mapped[int]
    body: Mapped[dict[str, Any]]
    location: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class ApiKey(Base):
    """Who may do what: the SHA-256 of a 256-bit secret, and scopes."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret_digest: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class Worker(Base):
    """A process that runs attempts, as it last described itself. One that drains finishes what it has and claims nothing more."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    host: Mapped[str]
    boot_id: Mapped[str]
    pid: Mapped[int]
    capabilities: Mapped[list[str]]
    slots: Mapped[int]
    version: Mapped[str]
    protocol: Mapped[int] = mapped_column(default=PROTOCOL, server_default=sa.text("1"))
    code_digest: Mapped[str | None]
    facts: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    draining_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]


class SingletonLease(Base):
    """At most one process does housekeeping at a time."""

    __tablename__ = "singleton_leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    until: Mapped[datetime]


class Secret(Base):
    """Random keys that all replicas share, for example the one that signs page cursors."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]
