"""Which labels are as good as which others, when labels were removed for their age, and which version number was the last.

Expand first, contract in a later release: running workers of the old version must survive this. What they insert meanwhile leaves
these columns out: their shards are labeled again rather than taken over, which costs time and is never wrong.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005_serves_0003"
down_revision = "0004_serves_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reuse_key", sa.Text(), nullable=True))
    op.create_index("ix_jobs_reuse_key", "jobs", ["reuse_key"], unique=False)
    op.add_column("jobs", sa.Column("reuse_dataset_key", sa.Text(), nullable=True))
    op.create_index("ix_jobs_reuse_dataset_key", "jobs", ["reuse_dataset_key"], unique=False)
    op.add_column("pseudo_label_sets", sa.Column("shards_expired_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("pseudo_label_sets", sa.Column("items_expired_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("datasets", sa.Column("last_number", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.create_index("ix_idempotency_records_created_at", "idempotency_records", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_idempotency_records_created_at", table_name="idempotency_records")
    op.drop_column("datasets", "last_number")
    op.drop_column("pseudo_label_sets", "items_expired_at")
    op.drop_column("pseudo_label_sets", "shards_expired_at")
    op.drop_index("ix_jobs_reuse_dataset_key", table_name="jobs")
    op.drop_column("jobs", "reuse_dataset_key")
    op.drop_index("ix_jobs_reuse_key", table_name="jobs")
    op.drop_column("jobs", "reuse_key")
