"""Indexes in the order in which shards are claimed and jobs are listed, so that both cost the same among a million jobs as among ten.

Expand first, contract in a later release: running workers of the old version must survive this. They find the same rows, faster.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

INDEXES: dict[str, tuple[str, list[str | sa.TextClause]]] = {
    "ix_jobs_set": ("jobs", ["pseudo_label_set_id", "status", sa.text("priority DESC"), "id"]),
    "ix_jobs_status": ("jobs", ["status", "id"]),
    "ix_jobs_kind": ("jobs", ["kind", "id"]),
    "ix_runs_status": ("runs", ["status", "id"]),
    "ix_dataset_versions_status": ("dataset_versions", ["status"]),
}


def upgrade() -> None:
    op.drop_index("ix_jobs_pseudo_label_set_id", table_name="jobs")
    for name, (table, columns) in INDEXES.items():
        op.create_index(name, table, columns, unique=False)


def downgrade() -> None:
    for name, (table, _) in INDEXES.items():
        op.drop_index(name, table_name=table)
    op.create_index("ix_jobs_pseudo_label_set_id", "jobs", ["pseudo_label_set_id"], unique=False)
