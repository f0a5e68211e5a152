"""What a chaos run found, as JSON for programs and as tables for people.

Several runs as one report: `python -m tests.faults.report build/chaos-*.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.recovery import BOUND_SECONDS
from tests.faults.runner import Outcome, Struck


def write_report(outcomes: Sequence[Outcome], path: Path) -> None:
    """`path` with the suffix .json, and beside it the tables with .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"bound_seconds": BOUND_SECONDS, "outcomes": [outcome.to_dict() for outcome in outcomes]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(outcomes), encoding="utf-8")


def read_reports(paths: Sequence[Path]) -> list[Outcome]:
    """What `write_report` wrote, in the order given."""
    found = [one for path in paths for one in json.loads(path.read_text(encoding="utf-8"))["outcomes"]]
    return [Outcome(**one | {"struck": [Struck(**struck) for struck in one["struck"]]}) for one in found]


def tables(outcomes: Sequence[Outcome]) -> str:
    """Markdown: the faults by kind and database, then what each run says of itself."""
    names = sorted({outcome.database for outcome in outcomes}, reverse=True)
    struck = {name: [one for outcome in outcomes if outcome.database == name for one in outcome.struck] for name in names}
    kinds = {one.kind: one.concerns for found in struck.values() for one in found}
    lines = [f"| fault | concerns | {' | '.join(f'{name} | recovery, median (longest)' for name in names)} |"]
    lines.append("| --- | --- |" + " --- | --- |" * len(names))
    for kind in sorted(kinds, key=lambda kind: (kinds[kind], kind)):
        cells = [cell for name in names for cell in _cells([one for one in struck[name] if one.kind == kind])]
        lines.append(f"| {kind} | {kinds[kind]} | {' | '.join(cells)} |")
    totals = [cell for name in names for cell in _cells(struck[name])]
    lines += [f"| **all** | | {' | '.join(totals)} |", "", *_sums(outcomes)]
    return "\n".join(lines) + "\n"


def _cells(struck: Sequence[Struck]) -> tuple[str, str]:
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
        "ends in the middle of one": [_describe_ends(outcome) for outcome in outcomes],
        "**lost**": [str(len(outcome.lost)) for outcome in outcomes],
        "**doubled**": [str(len(outcome.doubled)) for outcome in outcomes],
        "**broken**": [str(len(outcome.broken)) for outcome in outcomes],
    }
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def _describe_ends(outcome: Outcome) -> str:
    """Processes that ended by themselves while a fault went on, by fault."""
    ends = Counter(f"{end['member']} during {end['during']}" for end in outcome.unasked_ends if end["during"] is not None)
    return ", ".join(f"{count} × {what}" for what, count in ends.items()) or "0"


if __name__ == "__main__":
    print(tables(read_reports([Path(name) for name in sys.argv[1:]])))
