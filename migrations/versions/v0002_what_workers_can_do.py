"""Workers tell what they can do and may be drained; jobs tell which protocol they are written in; runs and sets have a priority.

Expand first, contract in a later release: running workers of the old version must survive this. What they insert meanwhile leaves
these columns out, so each has a default or may be null.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("facts", JSON, nullable=True))
    op.add_column("workers", sa.Column("code_digest", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("protocol", sa.Integer(), nullable=False, server_default=sa.text("1")))
    op.add_column("workers", sa.Column("draining_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("protocol", sa.Integer(), nullable=False, server_default=sa.text("1")))
    op.add_column("runs", sa.Column("priority", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("pseudo_label_sets", sa.Column("priority", sa.Integer(), nullable=False, server_default=sa.text("0")))
    # Each claim asks whether its worker drains.
    op.create_index("ix_workers_name", "workers", ["name"], unique=False)
    # Each claim takes the first job of the highest priority: in this order it need not sort the whole queue.
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index("ix_jobs_claim", "jobs", ["status", "capability", sa.text("priority DESC"), "id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index("ix_jobs_claim", "jobs", ["status", "capability", "priority", "id"], unique=False)
    op.drop_index("ix_workers_name", table_name="workers")
    for table, column in (
        ("pseudo_label_sets", "priority"),
        ("runs", "priority"),
        ("jobs", "protocol"),
        ("workers", "draining_at"),
        ("workers", "protocol"),
        ("workers", "code_digest"),
        ("workers", "facts"),
    ):
        op.drop_column(table, column)
