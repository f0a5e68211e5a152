"""Alembic's entrance. The caller hands over an open connection; `alembic` by hand reads NOISY_STUDENT_DATABASE_URL."""

from __future__ import annotations

import os

import sqlalchemy as sa
from alembic import context


def run(connection: sa.Connection) -> None:
    """Bring the schema behind this connection to the wanted revision, in one transaction."""
    metadata = context.config.attributes.get("metadata")
    context.configure(
        connection=connection, target_metadata=metadata, render_as_batch=connection.dialect.name == "sqlite", compare_type=True
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with sa.create_engine(os.environ["NOISY_STUDENT_DATABASE_URL"]).begin() as opened:
        run(opened)
