"""Indexes for a run's open jobs and for generations of one role: pages of either read what they show, however many rows there are.

Expand first, contract in a later release: running workers of the old version must survive this. They find the same rows, faster.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004_serves_0003"
down_revision = "0003"
branch_labels = None
depends_on = None

OPEN = sa.text("status IN ('queued', 'running')")


def upgrade() -> None:
    op.create_index("ix_jobs_open", "jobs", ["run_id", "id"], unique=False, sqlite_where=OPEN, postgresql_where=OPEN)
    op.create_index("ix_generations_role", "generations", ["role", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_generations_role", table_name="generations")
    op.drop_index("ix_jobs_open", table_name="jobs")
