"""The supervisor's end of an attempt's process: start it, talk to it, stop it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from core.logs import get_log


class Child:
    """One process of `workers.attempt`, in a process group of its own, dying with the thread that started it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.attempt", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=_environment(),
        )
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._gone = self._killed = False
        threading.Thread(target=self._read, name=f"child-{self.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id, and the id of its group."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether its last line was read."""
        return self._gone

    def send(self, request: dict[str, Any]) -> None:
        """Hand over one attempt. A dead child is noticed by `next_message`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            get_log().warning("child.gone", pid=self.pid)

    def next_message(self, timeout: float) -> dict[str, Any] | None:
        """The next line within `timeout` seconds, else None; after the last one `is_gone` is True."""
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        self._gone = self._gone or message is None
        return message

    def ask_to_stop(self) -> None:
        """SIGTERM: write a checkpoint, say interrupted. Only to the child itself; its helpers end with it."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> str:
        """SIGKILL to the whole group, helpers included, stopped ones too. Returns how the process ended, in words."""
        if not self._killed:
            # Once only: later the id may name somebody else.
            self._killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._close_input()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        # Closing flushes, and nobody may be there to read.
        with suppress(OSError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    self._messages.put(json.loads(line))
                except ValueError:
                    get_log().warning("child.line_refused", pid=self.pid, line=line[:200].decode(errors="replace"))
        self._messages.put(None)


def _environment() -> dict[str, str]:
    """The worker's own, without its settings: database, broker, bucket and keys stay outside of the process that opens people's files."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("NOISY_STUDENT_", "CELERY_", "PG", "AWS_"))}
