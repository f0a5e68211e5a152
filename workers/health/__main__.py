"""`python -m workers.health`: 0 when the worker of this machine or container is alive, else 1 and one line why. For health checks."""

from __future__ import annotations

import sys

from core.settings import Settings
from workers.health import find_problem


def main() -> int:
    """Look at the data directory of the environment."""
    problem = find_problem(Settings().workers_directory)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
