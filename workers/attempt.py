"""The child: one process that does the work of one attempt after another, as told by JSON lines on its standard input.

Answers, as JSON lines on what was its standard output (everything else that is printed goes into the attempt's log):

    {"type": "event", "kind": …, "data": …}      what ml reports
    {"type": "runtime", "runtime": …}            the resolved runtime
    {"type": "result", "files": …, "result": …}  the attempt succeeded; paths of what it made
    {"type": "error", "error": …}                it failed: class, code, message, perhaps step and details
    {"type": "interrupted"}                      SIGTERM came; the checkpoint is written
    {"type": "interrupted", "reason": …, "message": …}  it could not begin, through no fault of the job's

Never a sign of life that does not come from the work itself: a hung attempt must look hung.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

from ml import errors
from ml.config import RuntimeConfig
from ml.events import Event
from ml.locations import find_stored_at
from ml.validation import to_dict
from workers.folders import FolderBusy, alone_in
from workers.jobs import MODULES, JobModule, Work
from workers.processes import die_with_parent

FAILURES: dict[type[BaseException], tuple[str, str]] = {
    errors.UnknownArchitecture: ("permanent", "recipe.unknown_architecture"),
    errors.RecipeError: ("permanent", "recipe.invalid"),
    errors.NoImages: ("permanent", "data.no_images"),
    errors.BadImage: ("permanent", "data.bad_image"),
    errors.ClassMismatch: ("permanent", "data.class_mismatch"),
    errors.Leakage: ("permanent", "data.leakage"),
    errors.StoreRefused: ("permanent", "data.store_refused"),
    errors.TooFewLabels: ("permanent", "data.too_few_labels"),
    errors.DataError: ("permanent", "data.invalid"),
    errors.NothingSelected: ("permanent", "selection.nothing_selected"),
    errors.PoolTooSmall: ("permanent", "selection.pool_too_small"),
    errors.SelectionError: ("permanent", "selection.failed"),
    errors.WeightsError: ("permanent", "weights.unusable"),
    errors.CheckpointDamaged: ("permanent", "checkpoint.damaged"),
    errors.Diverged: ("permanent", "training.diverged"),
    errors.OutOfMemory: ("resource", "memory.exhausted"),
    MemoryError: ("resource", "memory.exhausted"),
    errors.DiskFull: ("retryable", "storage.full"),
    errors.LoaderLost: ("retryable", "loader.lost"),
    errors.StoreAway: ("retryable", "storage.unavailable"),
    errors.MlError: ("permanent", "ml.refused"),
}
"""Class and code of what ml raises; the first that fits counts, so the special stand before the general."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EROFS)


def describe_failure(error: BaseException) -> dict[str, Any]:
    """The error as the job's row keeps it: class, code, message, and step and details where there are some."""
    kind, code = next((found for cls, found in FAILURES.items() if isinstance(error, cls)), ("permanent", "attempt.crashed"))
    if isinstance(error, OSError) and error.errno in (*_FULL, *_AWAY):
        kind, code = "retryable", "storage.full" if error.errno in _FULL else "storage.unavailable"
    if isinstance(error, BlockingIOError):
        # What fork says when there may be no more processes for now.
        kind, code = "retryable", "host.busy"
    known = isinstance(error, errors.MlError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    failure: dict[str, Any] = {"class": kind, "code": code, "message": message[:4000]}
    details = dict(getattr(error, "details", {}))
    if isinstance(details.get("step"), int):
        failure["step"] = details["step"]
    return failure | {"details": details} if details else failure


class Speaker:
    """Writes JSON lines to the supervisor, whole ones, from any thread."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        """One line that every database takes."""
        line = json.dumps(_clean(message), allow_nan=False, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


def _clean(value: Any) -> Any:
    """Without what JSON (NaN, infinity) or PostgreSQL's JSON (the character 0, half characters) does not know."""
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return value.replace("\0", "").encode(errors="replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Attempt:
    """This process's wish to stop, and what it does with one request."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self._stop = threading.Event()

    def ask_to_stop(self, _signal: int, _frame: FrameType | None) -> None:
        """SIGTERM's handler."""
        self._stop.set()

    def run(self, request: dict[str, Any]) -> None:
        """Do one attempt and say how it ended; whatever goes wrong becomes an error line, and its traceback a part of the log."""
        directory = Path(request["directory"])
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with log_to(directory / f"attempt-{request['attempt']}.log"), alone_in(directory):
                self._do(request, directory)
        except FolderBusy as error:
            self.speaker.say({"type": "interrupted", "reason": "attempt.directory_busy", "message": str(error)})
        except OSError as error:
            self.speaker.say({"type": "error", "error": describe_failure(error)})

    def _do(self, request: dict[str, Any], directory: Path) -> None:
        speaker = self.speaker
        find_stored_at(request["stored_at"])
        work = Work(
            input=request["input"],
            directory=directory,
            halve_micro_batch=request["halve_micro_batch"],
            capabilities=tuple(request["capabilities"]),
            on_event=self._report,
            should_stop=self._stop.is_set,
            on_runtime=self._report_runtime,
        )
        try:
            if self._stop.is_set():
                raise errors.Interrupted("stopped before the work began")
            module = cast(JobModule, importlib.import_module(MODULES[request["kind"]]))
            made = module.run(work)
            files = {name: str(path) for name, path in made.files.items()}
            speaker.say({"type": "result", "files": files, "result": made.result})
        except errors.Interrupted:
            speaker.say({"type": "interrupted"})
        except BrokenPipeError:
            raise
        except Exception as error:  # the attempt's outermost frame: a surprise is this attempt's end, not the worker's
            traceback.print_exc()
            speaker.say({"type": "error", "error": describe_failure(error)})

    def _report(self, event: Event) -> None:
        self.speaker.say({"type": "event", "kind": event.kind, "data": event.data})

    def _report_runtime(self, runtime: RuntimeConfig) -> None:
        self.speaker.say({"type": "runtime", "runtime": to_dict(runtime)})


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send standard output and error, those of libraries and child processes too, to the attempt's log."""
    kept = os.dup(2)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.dup2(kept, 2)
        os.close(descriptor)
        os.close(kept)


def main() -> int:
    """Serve requests until the supervisor closes the pipe."""
    die_with_parent(int(sys.argv[1]))
    speaker = Speaker(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    # Whatever prints must not speak to the supervisor.
    os.dup2(2, 1)
    attempt = Attempt(speaker)
    signal.signal(signal.SIGTERM, attempt.ask_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        attempt.run(json.loads(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
