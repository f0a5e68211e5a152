"""Alembic, one thought each, for SQLite and PostgreSQL. Imports alembic and sqlalchemy only."""
