"""`python -m workers`: a worker without a broker, on the environment's settings. `noisy-student up` starts this as one of its children."""

from __future__ import annotations

import os
import signal
import sys
import threading

from core.errors import SetupError
from core.logs import configure_logs
from core.settings import Settings
from workers.processes import has_nvidia_gpu
from workers.worker import FullWorker


def main() -> int:
    """Work until SIGTERM or Ctrl-C; 2 when the process cannot start, 1 after a surprise."""
    configure_logs(json_lines=not sys.stderr.isatty())
    try:
        settings = Settings()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "NOISY_STUDENT_CAPABILITIES" not in os.environ and has_nvidia_gpu():
        settings = settings.model_copy(update={"capabilities": ("cpu", "cuda")})
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    try:
        worker = FullWorker(settings, on_crash=stop.set)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worker.start()
    stop.wait()
    worker.stop()
    return 1 if worker.supervisor.crashed.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
