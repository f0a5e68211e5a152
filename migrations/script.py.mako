"""${message}

Expand first, contract in a later release: running processes of the old version must survive this. What they go on over says so in its
name: `0004_serves_0003` goes with code that was written for 0003; `0004` alone takes every older process out (docs/decisions/0025).
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
