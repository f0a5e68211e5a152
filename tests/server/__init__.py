"""The API through HTTP, on a migrated database and real files."""
