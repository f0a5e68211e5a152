"""Rows: tables, the one place that commits, and one module a noun for what may be done to them."""
