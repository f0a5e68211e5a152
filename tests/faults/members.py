"""The service's processes, each restarted when it ends, as a supervisor of a real deployment does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.builders_services import wait_until
from tests.faults.proxy import Proxy
from tests.workers.builders import children_of

REPOSITORY = Path(__file__).resolve().parents[2]
INTERFERENCE = Path(__file__).parent / "interference"
RESTART_SECONDS = 0.5
STOP_SECONDS = 30.0


@dataclass(eq=False, slots=True)
class Member:
    """One process of the service, under a name that outlives it."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    directory: Path
    database_proxy: Proxy | None = None
    broker_proxy: Proxy | None = None
    process: subprocess.Popen[bytes] | None = None
    ended_at: float = 0.0
    starts: int = 0
    held: bool = False
    """Nobody restarts it for now."""
    killed: set[int] = field(default_factory=set)
    """Process ids that a fault has ended."""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def control(self) -> Path:
        return self.directory / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        paths = os.pathsep.join([str(INTERFERENCE), str(REPOSITORY)])
        environment = {**self.environment, "CHAOS_CONTROL": str(self.control), "CHAOS_RUNNER": str(os.getpid()), "PYTHONPATH": paths}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY)
        self.starts += 1

    def wish(self, **wishes: Any) -> None:
        """What shall go wrong inside from now on; nothing when nothing is named."""
        aside = self.control.with_suffix(".new")
        aside.write_text(json.dumps(wishes))
        aside.replace(self.control)

    def count_effects(self, name: str) -> int:
        """How often it went wrong so far."""
        with suppress(FileNotFoundError):
            return Path(f"{self.control}.effects").read_text().splitlines().count(name)
        return 0

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.killed.add(self.pid)
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        process = self.process
        self.signal(signal.SIGKILL)
        if process is not None:
            process.wait()

    def children(self) -> list[int]:
        """Attempts that it runs."""
        return children_of(self.pid) if self.is_alive() else []


class Members:
    """All processes of one service, and the thread that restarts them."""

    def __init__(self) -> None:
        self.all: dict[str, Member] = {}
        self.unasked: list[dict[str, Any]] = []
        """Ends that no fault has asked for."""
        self.fault_now: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="members", daemon=True)

    def add(self, member: Member) -> None:
        self.all[member.name] = member
        member.wish()

    def start(self) -> None:
        self._thread.start()

    def workers(self) -> list[Member]:
        return [member for name, member in self.all.items() if name.startswith("worker")]

    @property
    def api(self) -> Member:
        return self.all["api"]

    def with_pid(self, pid: int) -> Member | None:
        return next((member for member in self.all.values() if member.process is not None and member.pid == pid), None)

    def busy_worker(self, *, seconds: float = 20) -> tuple[Member, int] | None:
        """A worker that runs an attempt, and the attempt's process; None when none does for so long."""
        with suppress(AssertionError):
            return wait_until(lambda: next(((m, c) for m in self.workers() for c in m.children()), None), seconds=seconds)  # type: ignore[no-any-return]
        return None

    def stop(self) -> None:
        """An orderly end of everything; what does not come to one is killed."""
        for member in self.all.values():
            member.held = True
            if member.is_alive():
                member.signal(signal.SIGCONT)
                member.signal(signal.SIGTERM)
        for member in self.all.values():
            if member.process is None:
                continue
            try:
                member.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.unasked.append({"member": member.name, "status": "did not stop when asked to", "during": None})
                member.kill()
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while not self._over.wait(0.1):
            for member in self.all.values():
                self._look_after(member)

    def _look_after(self, member: Member) -> None:
        if member.held:
            return
        if member.process is not None and member.is_alive():
            return
        now = time.monotonic()
        if not member.ended_at:
            member.ended_at = now
            self._note_end(member)
        elif now - member.ended_at >= RESTART_SECONDS:
            member.ended_at = 0.0
            member.start()

    def _note_end(self, member: Member) -> None:
        if member.process is not None and member.pid not in member.killed:
            self.unasked.append({"member": member.name, "status": member.process.returncode, "during": self.fault_now})


def command_of(*module: str) -> list[str]:
    """As the deployment starts it."""
    return [sys.executable, "-m", *module]
