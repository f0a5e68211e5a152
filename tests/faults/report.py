"""What a chaos run found, as JSON for programs and as tables for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from tests.faults.recovery import BOUND_SECONDS
from tests.faults.runner import Outcome


def write_report(outcomes: Sequence[Outcome], path: Path) -> None:
    """`path` with the suffix .json, and beside it the tables with .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"bound_seconds": BOUND_SECONDS, "outcomes": [outcome.to_dict() for outcome in outcomes]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(outcomes), encoding="utf-8")


def tables(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    names = [outcome.database for outcome in outcomes]
    kinds: dict[str, str] = {}
    for outcome in outcomes:
        kinds |= {struck.kind: struck.concerns for struck in outcome.struck}
    lines = [f"| fault | concerns | {' | '.join(f'{name} | recovery, median (longest)' for name in names)} |"]
    lines.append("| --- | --- |" + " --- | --- |" * len(names))
    for kind in sorted(kinds, key=lambda kind: (kinds[kind], kind)):
        cells = [cell for outcome in outcomes for cell in _cells(outcome, kind)]
        lines.append(f"| {kind} | {kinds[kind]} | {' | '.join(cells)} |")
    totals = [cell for outcome in outcomes for cell in _cells(outcome, None)]
    lines += [f"| **all** | | {' | '.join(totals)} |", "", *_sums(outcomes)]
    return "\n".join(lines) + "\n"


def _cells(outcome: Outcome, kind: str | None) -> tuple[str, str]:
    struck = [one for one in outcome.struck if kind is None or one.kind == kind]
    seconds = [one.recovery_seconds for one in struck if one.recovery_seconds is not None]
    recovery = f"{statistics.median(seconds):.1f} s ({max(seconds):.1f} s)" if seconds else ""
    return str(len(struck) or ""), recovery


def _sums(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [f"| | {' | '.join(outcome.database for outcome in outcomes)} |", "| --- |" + " --- |" * len(outcomes)]
    rows = {
        "files in": [outcome.storage for outcome in outcomes],
        "seed": [str(outcome.seed) for outcome in outcomes],
        "minutes": [f"{outcome.seconds / 60:.1f}" for outcome in outcomes],
        "faults": [str(len(outcome.struck)) for outcome in outcomes],
        "accepted": [", ".join(f"{count} {noun}" for noun, count in outcome.accepted.items()) for outcome in outcomes],
        "requests sent for them": [str(outcome.sent) for outcome in outcomes],
        "promotions answered": [str(outcome.moves) for outcome in outcomes],
        "predictions": [", ".join(f"{count} × {status}" for status, count in outcome.predictions.items()) for outcome in outcomes],
        "commits reported as failed": [str(sum(one.facts.get("commits", 0) for one in outcome.struck)) for outcome in outcomes],
        "ends without a fault": [str(sum(end["during"] is None for end in outcome.unasked_ends)) for outcome in outcomes],
        "**lost**": [str(len(outcome.lost)) for outcome in outcomes],
        "**doubled**": [str(len(outcome.doubled)) for outcome in outcomes],
        "**broken**": [str(len(outcome.broken)) for outcome in outcomes],
    }
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
