"""`python -m tests.faults --seed 7 --minutes 10`: faults by the minute over real processes; 1 when anything was lost, doubled or broken."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.faults.plan import KINDS, kinds_of
from tests.faults.report import tables, write_report
from tests.faults.runner import Outcome, run_chaos

DATABASES = {"sqlite": "folder", "postgresql": "bucket"}
"""Each with the storage that it is tried with, unless another is asked for."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the order of the faults and what the clients want")
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, in all; shared by the databases")
    parser.add_argument("--database", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--storage", choices=("folder", "bucket"), help="where files are kept; default: each database with its own")
    parser.add_argument("--report", type=Path, help="where JSON and tables go, with .json and .md")
    parser.add_argument("--workers", type=int, default=3, help="worker processes")
    parser.add_argument("--no-training", action="store_true", help="neither runs nor labels, which need torch")
    parser.add_argument("--only", action="append", help="only faults of this name; may be repeated. Some take minutes and come only so")
    parser.add_argument("--logs", type=Path, help="where the processes' logs go when something was wrong")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    known = {kind.name for kind in KINDS}
    if set(arguments.only or ()) - known:
        print(f"error: known faults are {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    databases = list(DATABASES) if arguments.database == "both" else [arguments.database]
    outcomes: list[Outcome] = []
    for database in databases:
        storage = arguments.storage or DATABASES[database]
        kinds = kinds_of(database, storage, trains=not arguments.no_training)
        kinds = [kind for kind in kinds if (kind.name in arguments.only if arguments.only else not kind.takes_minutes)]
        outcome = run_chaos(
            database,
            storage,
            seed=arguments.seed,
            minutes=arguments.minutes / len(databases),
            kinds=kinds,
            trains=not arguments.no_training,
            num_workers=arguments.workers,
            logs=arguments.logs,
        )
        outcomes.append(outcome)
        if arguments.report is not None:
            write_report(outcomes, arguments.report)
    print(tables(outcomes))
    problems = [f"{outcome.database}: {problem}" for outcome in outcomes for problem in (*outcome.lost, *outcome.doubled, *outcome.broken)]
    print("\n".join(problems) or "nothing was lost, nothing doubled, nothing broken")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
