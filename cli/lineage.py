"""A run's generations as a table: who taught whom, on how many pseudo-labels, and how good each is."""

from __future__ import annotations

from typing import Any

from cli.client import API
from cli.invocation import Invocation
from cli.output import show_accuracy

COLUMNS = {
    "generation": "title",
    "id": "generation_id",
    "pseudo-labels": "num_pseudo_labels",
    "validation top-1 (95 %)": "validation_text",
    "test top-1 (95 %)": "test_text",
    "aliases": "aliases_text",
}


def print_lineage(invocation: Invocation, run_id: str) -> list[dict[str, Any]]:
    """Print it, unless there is nothing yet; returns its entries."""
    entries: list[dict[str, Any]] = invocation.client.get(f"{API}/runs/{run_id}/lineage")["generations"]
    if entries:
        invocation.output.table([describe_entry(entry) for entry in entries], COLUMNS, title="lineage")
    return entries


def describe_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with its cells as text."""
    texts = {
        "title": f"{entry['iteration']} {entry['role']}",
        "validation_text": show_accuracy(entry["validation"]),
        "test_text": show_accuracy(entry["test"]),
        "aliases_text": ", ".join(entry["aliases"]) or None,
    }
    return entry | texts
