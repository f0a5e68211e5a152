"""`python -m bench [NAME ...]`: measure, print tables, write bench/results/<name>.json; non-zero when a goal is missed unexplained.

Each measurement runs in a process of its own, so that none inherits another's threads, caches or memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time

from bench.goals import BY_HAND, MEASUREMENTS, Verdict, judge
from bench.measurement import RESULTS, SHORTFALLS, Measurement, print_table, write


def main() -> int:
    """Run the measurements that are asked for (by default all that need nobody's minutes); 1 when a goal is missed and has no breakdown."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"{', '.join(MEASUREMENTS)} (all of these when none is named), {', '.join(BY_HAND)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}")
    parser.add_argument("--here", action="store_true", help="measure in this process, one NAME only, and judge nothing")
    options = parser.parse_args()
    names = options.names or list(MEASUREMENTS)
    if unknown := sorted(set(names) - {*MEASUREMENTS, *BY_HAND}):
        parser.error(f"there is no measurement {', '.join(unknown)}; known: {known}")
    if options.here:
        for name in names:
            _measure_here(name)
        return 0
    figures: dict[str, float] = {}
    for name in names:
        figures |= _measure_apart(name)
    verdicts = judge(figures, names, SHORTFALLS.read_text(encoding="utf-8"))
    print_table("Goals", [_row(verdict) for verdict in verdicts])
    return 0 if all(verdict.passes for verdict in verdicts) else 1


def _measure_here(name: str) -> None:
    started = time.monotonic()
    measurement: Measurement = importlib.import_module(f"bench.{name}").measure()
    seconds = time.monotonic() - started
    for title, rows in measurement.tables.items():
        print_table(title, rows)
    print(f"\n{name}: {seconds:.0f} s, written to {write(measurement, seconds=seconds)}", flush=True)


def _measure_apart(name: str) -> dict[str, float]:
    """The figures of one measurement by goal id; none when it failed."""
    print(f"\n=== {name} ===", flush=True)
    ended = subprocess.run([sys.executable, "-m", "bench", "--here", name], check=False)
    if ended.returncode:
        print(f"{name} failed with exit code {ended.returncode}; its goals count as not measured", flush=True)
        return {}
    found: dict[str, float] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]
    return found


def _row(verdict: Verdict) -> dict[str, str]:
    value = "–" if verdict.value is None else f"{verdict.value:.3g} {verdict.goal.unit}".rstrip()
    return {"goal": verdict.goal.id, "what": verdict.goal.what, "wanted": verdict.goal.wanted(), "measured": value, "": verdict.word}


if __name__ == "__main__":
    sys.exit(main())
