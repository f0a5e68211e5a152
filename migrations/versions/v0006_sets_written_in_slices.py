"""Which labeling job of a set waits until all others of it are written.

What older code inserts leaves it empty: it writes whole sets. Of a set of newer code it waits for the held job, without adding those
that are missing.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_serves_0003"
down_revision = "0005_serves_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pseudo_label_sets", sa.Column("held_job_id", sa.Text(), nullable=True))
    unwritten = sa.text("held_job_id IS NOT NULL")
    op.create_index(
        "ix_pseudo_label_sets_unwritten", "pseudo_label_sets", ["held_job_id"], sqlite_where=unwritten, postgresql_where=unwritten
    )


def downgrade() -> None:
    op.drop_index("ix_pseudo_label_sets_unwritten", table_name="pseudo_label_sets")
    op.drop_column("pseudo_label_sets", "held_job_id")
