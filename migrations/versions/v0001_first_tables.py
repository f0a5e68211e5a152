"""The first tables.

Expand first, contract in a later release: running workers of the old version must survive this.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_digest", sa.Text(), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("secret_digest", name=op.f("uq_api_keys_secret_digest")),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kind IN ('labeled', 'unlabeled', 'evaluation')", name=op.f("ck_datasets_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("name", name=op.f("uq_datasets_name")),
    )
    op.create_table(
        "idempotency_records",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=False),
        sa.Column("body", JSON, nullable=False),
        sa.Column("location", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", "api_key_id", name=op.f("pk_idempotency_records")),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index("ix_outbox_published_at", "outbox", ["published_at", "id"], unique=False)

    op.create_table(
        "promotions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("generation_id", sa.Text(), nullable=False),
        sa.Column("previous_generation_id", sa.Text(), nullable=True),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("gate", JSON, nullable=True),
        sa.Column("actor", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("action IN ('promote', 'rollback')", name=op.f("ck_promotions_action")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
        sa.UniqueConstraint("alias", "version", name=op.f("uq_promotions_alias_version")),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secrets")),
    )
    op.create_table(
        "singleton_leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_singleton_leases")),
    )
    op.create_table(
        "stored_files",
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner_id", "name", name=op.f("pk_stored_files")),
    )
    op.create_index("ix_stored_files_digest", "stored_files", ["digest"], unique=False)

    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("capabilities", JSON, nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stopped_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("source", JSON, nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.Column("manifest_digest", sa.Text(), nullable=True),
        sa.Column("num_images", sa.Integer(), nullable=True),
        sa.Column("num_usable", sa.Integer(), nullable=True),
        sa.Column("class_names", JSON, nullable=True),
        sa.Column("report", JSON, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'ready', 'failed')", name=op.f("ck_dataset_versions_status")),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_dataset_versions_dataset_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_versions")),
        sa.UniqueConstraint("dataset_id", "number", name=op.f("uq_dataset_versions_dataset_id_number")),
    )
    op.create_index(op.f("ix_dataset_versions_job_id"), "dataset_versions", ["job_id"], unique=False)

    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("recipe", JSON, nullable=False),
        sa.Column("iterations_wanted", sa.Integer(), nullable=False),
        sa.Column("labeled_version_id", sa.Text(), nullable=False),
        sa.Column("unlabeled_version_id", sa.Text(), nullable=False),
        sa.Column("validation_version_id", sa.Text(), nullable=True),
        sa.Column("test_version_id", sa.Text(), nullable=True),
        sa.Column("initial_generation_id", sa.Text(), nullable=True),
        sa.Column("runtime", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("num_events", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("status IN ('active', 'paused', 'completed', 'failed', 'canceled')", name=op.f("ck_runs_status")),
        sa.ForeignKeyConstraint(["labeled_version_id"], ["dataset_versions.id"], name=op.f("fk_runs_labeled_version_id")),
        sa.ForeignKeyConstraint(["test_version_id"], ["dataset_versions.id"], name=op.f("fk_runs_test_version_id")),
        sa.ForeignKeyConstraint(["unlabeled_version_id"], ["dataset_versions.id"], name=op.f("fk_runs_unlabeled_version_id")),
        sa.ForeignKeyConstraint(["validation_version_id"], ["dataset_versions.id"], name=op.f("fk_runs_validation_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_table(
        "generations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=True),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("teacher_generation_id", sa.Text(), nullable=True),
        sa.Column("pseudo_label_set_id", sa.Text(), nullable=True),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("class_names", JSON, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("lineage", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('teacher', 'student', 'control', 'imported')", name=op.f("ck_generations_role")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_generations_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_generations")),
        sa.UniqueConstraint("job_id", name=op.f("uq_generations_job_id")),
    )
    op.create_index(op.f("ix_generations_run_id"), "generations", ["run_id"], unique=False)
    op.create_index(op.f("ix_generations_teacher_generation_id"), "generations", ["teacher_generation_id"], unique=False)

    op.create_table(
        "iterations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("plan", JSON, nullable=False),
        sa.Column("teacher_generation_id", sa.Text(), nullable=True),
        sa.Column("generation_id", sa.Text(), nullable=True),
        sa.Column("control_generation_id", sa.Text(), nullable=True),
        sa.Column("pseudo_label_set_id", sa.Text(), nullable=True),
        sa.Column("unlabeled_version_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "phase IN ('labeling', 'selecting', 'training', 'evaluating', 'exporting', 'done', 'failed', 'canceled')",
            name=op.f("ck_iterations_phase"),
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_iterations_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_iterations")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_iterations_run_id_number")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("capability", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=True),
        sa.Column("step", sa.Text(), nullable=True),
        sa.Column("part", sa.Integer(), nullable=True),
        sa.Column("pseudo_label_set_id", sa.Text(), nullable=True),
        sa.Column("generation_id", sa.Text(), nullable=True),
        sa.Column("input", JSON, nullable=False),
        sa.Column("result", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("progress", JSON, nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lost_attempts", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("lease_holder", sa.Text(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("hinted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("num_events", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(status = 'running') = (lease_holder IS NOT NULL)", name=op.f("ck_jobs_lease_while_running")),
        sa.CheckConstraint("kind IN ('ingest', 'split', 'train', 'label', 'select', 'predict', 'import')", name=op.f("ck_jobs_kind")),
        sa.CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'canceled')", name=op.f("ck_jobs_status")),
        sa.CheckConstraint("(lease_holder IS NULL) = (lease_until IS NULL)", name=op.f("ck_jobs_lease")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_jobs_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("run_id", "iteration", "step", "part", name=op.f("uq_jobs_run_id_iteration_step_part")),
    )
    op.create_index("ix_jobs_claim", "jobs", ["status", "capability", "priority", "id"], unique=False)
    op.create_index(op.f("ix_jobs_generation_id"), "jobs", ["generation_id"], unique=False)
    op.create_index("ix_jobs_lease_until", "jobs", ["lease_until"], unique=False)
    op.create_index(op.f("ix_jobs_pseudo_label_set_id"), "jobs", ["pseudo_label_set_id"], unique=False)
    op.create_index("ix_jobs_run_id", "jobs", ["run_id", "id"], unique=False)

    op.create_table(
        "aliases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("generation_id", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["generation_id"], ["generations.id"], name=op.f("fk_aliases_generation_id")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aliases")),
    )
    op.create_index(op.f("ix_aliases_generation_id"), "aliases", ["generation_id"], unique=False)

    op.create_table(
        "events",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("run_number", sa.Integer(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_events")),
    )
    op.create_index("ix_events_run", "events", ["run_id", "run_number"], unique=True)

    op.create_table(
        "pseudo_label_sets",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("iteration", sa.Integer(), nullable=True),
        sa.Column("generation_id", sa.Text(), nullable=False),
        sa.Column("selection_generation_id", sa.Text(), nullable=True),
        sa.Column("unlabeled_version_id", sa.Text(), nullable=False),
        sa.Column("labeling", JSON, nullable=False),
        sa.Column("selection", JSON, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("num_shards", sa.Integer(), nullable=False),
        sa.Column("num_images", sa.Integer(), nullable=False),
        sa.Column("report", JSON, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("status IN ('labeling', 'selecting', 'ready', 'failed', 'canceled')", name=op.f("ck_pseudo_label_sets_status")),
        sa.ForeignKeyConstraint(["generation_id"], ["generations.id"], name=op.f("fk_pseudo_label_sets_generation_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_pseudo_label_sets_run_id")),
        sa.ForeignKeyConstraint(["unlabeled_version_id"], ["dataset_versions.id"], name=op.f("fk_pseudo_label_sets_unlabeled_version_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pseudo_label_sets")),
    )
    op.create_index(op.f("ix_pseudo_label_sets_generation_id"), "pseudo_label_sets", ["generation_id"], unique=False)
    op.create_index(op.f("ix_pseudo_label_sets_run_id"), "pseudo_label_sets", ["run_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_pseudo_label_sets_run_id"), table_name="pseudo_label_sets")
    op.drop_index(op.f("ix_pseudo_label_sets_generation_id"), table_name="pseudo_label_sets")

    op.drop_table("pseudo_label_sets")
    op.drop_index("ix_events_run", table_name="events")

    op.drop_table("events")
    op.drop_index(op.f("ix_aliases_generation_id"), table_name="aliases")

    op.drop_table("aliases")
    op.drop_index("ix_jobs_run_id", table_name="jobs")
    op.drop_index(op.f("ix_jobs_pseudo_label_set_id"), table_name="jobs")
    op.drop_index("ix_jobs_lease_until", table_name="jobs")
    op.drop_index(op.f("ix_jobs_generation_id"), table_name="jobs")
    op.drop_index("ix_jobs_claim", table_name="jobs")

    op.drop_table("jobs")
    op.drop_table("iterations")
    op.drop_index(op.f("ix_generations_teacher_generation_id"), table_name="generations")
    op.drop_index(op.f("ix_generations_run_id"), table_name="generations")

    op.drop_table("generations")
    op.drop_table("runs")
    op.drop_index(op.f("ix_dataset_versions_job_id"), table_name="dataset_versions")

    op.drop_table("dataset_versions")
    op.drop_table("workers")
    op.drop_index("ix_stored_files_digest", table_name="stored_files")

    op.drop_table("stored_files")
    op.drop_table("singleton_leases")
    op.drop_table("secrets")
    op.drop_table("promotions")
    op.drop_index("ix_outbox_published_at", table_name="outbox")

    op.drop_table("outbox")
    op.drop_table("idempotency_records")
    op.drop_table("datasets")
    op.drop_table("api_keys")
