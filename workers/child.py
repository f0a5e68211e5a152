"""The supervisor's end of an attempt's process: start it, talk to it, stop it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from core.logs import get_log
from core.settings import Settings

_NO_SECRETS = (
    "AWS_CA_BUNDLE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_USE_FIPS_ENDPOINT",
)
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",
)
"""What botocore's chain reads, beside the endpoint; nothing else that begins with AWS_ reaches an attempt."""


class Child:
    """One process of `workers.attempt`, in a process group of its own, dying with the thread that started it."""

    def __init__(self, access: Mapping[str, str]) -> None:
        """`access`: variables that let it read its images in S3; empty when they lie elsewhere."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.attempt", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**_environment(), **access},
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


def find_access(settings: Settings) -> dict[str, str]:
    """The variables with which botocore reads datasets in S3: the settings' own key, else what it finds in this process's environment."""
    named = settings.dataset_access
    if "AWS_ACCESS_KEY_ID" in named:
        return named | {name: value for name, value in os.environ.items() if name in _NO_SECRETS and name not in named}
    return {name: value for name, value in os.environ.items() if name in (*_NO_SECRETS, *_CREDENTIALS)} | named
