"""The Compose file's fleet as processes of this machine: started in order, watched, restarted, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cli.processes import dying_with_parent
from deploy.compose_file import ComposeService
from deploy.loopback import BIN, PUBLIC, Loopback, Start

START_SECONDS = 90.0
RESTART_SECONDS = 1.0
CHECK_SECONDS = 10.0
_LOOK_SECONDS = 0.2


class FleetFailed(Exception):
    """A process did not start, or did not become healthy."""


@dataclass
class Member:
    """One process of the fleet."""

    name: str
    service: ComposeService
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    due: float = 0.0

    def lives(self) -> bool:
        """Whether it runs now."""
        return self.process is not None and self.process.poll() is None


@dataclass
class Fleet:
    """Every service of the file, with its replicas."""

    services: Mapping[str, ComposeService]
    place: Loopback
    say: Callable[[str], None]
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The one address."""
        return f"http://127.0.0.1:{self.place.port(PUBLIC)}"

    def start(self) -> None:
        """Start what the file orders, each service when what it needs is there; returns when everything is healthy."""
        for folder in (self.place.directory, self.place.datasets):
            folder.mkdir(parents=True, exist_ok=True)
        waiting = dict(self.services)
        done: set[str] = set()
        while waiting:
            ready = [service for service in waiting.values() if all(need in done for need in service.needs if need in self.services)]
            for service in ready:
                self._start_service(service)
            for service in ready:
                self._await_service(service)
                done.add(service.name)
                del waiting[service.name]
        self._write_state()

    def tend(self) -> None:
        """Start again what has ended although the file says that it goes on."""
        for member in self.members.values():
            if member.lives() or not member.service.restart:
                continue
            if member.due == 0.0:
                member.due = time.monotonic() + RESTART_SECONDS
                self.say(f"{member.name} ended with {member.process.returncode if member.process else 'nothing'}; it is started again")
            elif time.monotonic() >= member.due:
                self._start_member(member)
                self._write_state()

    def stop(self) -> None:
        """The last ones first; each gets the time that the file gives it."""
        for service in reversed(self._in_order()):
            members = [member for member in self.members.values() if member.service is service and member.lives()]
            for member in members:
                assert member.process is not None
                # PostgreSQL ends connections on SIGINT, and would wait for them on SIGTERM.
                member.process.send_signal(signal.SIGINT if service.name == "postgres" else signal.SIGTERM)
                member.process.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + service.stop_grace_seconds
            for member in members:
                _end(member, deadline)
        (self.place.directory / "fleet.json").unlink(missing_ok=True)

    def run(self) -> None:
        """Tend the fleet until Ctrl-C or SIGTERM."""
        ended = False

        def end(_number: int, _frame: object) -> None:
            nonlocal ended
            ended = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        while not ended:
            self.tend()
            time.sleep(_LOOK_SECONDS)

    def is_healthy(self, member: Member) -> bool:
        """What the file's health check says of it; whether it runs, when there is none."""
        check = self.place.health_check(member.service, member.name)
        if not member.lives() or check is None:
            return member.lives()
        try:
            environment = self._environment(check)
            ended = subprocess.run(check.command, env=environment, capture_output=True, timeout=CHECK_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return False
        return ended.returncode == 0

    def _in_order(self) -> list[ComposeService]:
        """As they were started."""
        return [self.services[name] for name in dict.fromkeys(member.service.name for member in self.members.values())]

    def _start_service(self, service: ComposeService) -> None:
        for name in self.place.names(service.name):
            member = self.members[name] = Member(name, service, self.place.directory / "logs" / f"{name}.log")
            self._start_member(member)

    def _start_member(self, member: Member) -> None:
        start = self.place.start(member.service, member.name)
        member.log.parent.mkdir(parents=True, exist_ok=True)
        with member.log.open("ab") as log:
            member.process = subprocess.Popen(
                start.command,
                env=self._environment(start),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509  the runner has one thread
                **start.options,
            )
        member.starts += 1
        member.due = 0.0

    @staticmethod
    def _environment(start: Start) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("NOISY_STUDENT_", "AWS_", "POSTGRES_"))}
        return {**ours, "PATH": f"{BIN}:{os.environ.get('PATH', '')}", **start.environment}

    def _await_service(self, service: ComposeService) -> None:
        members = [member for member in self.members.values() if member.service is service]
        deadline = time.monotonic() + START_SECONDS
        for member in members:
            while not self._has_started(member):
                if time.monotonic() > deadline or (not member.lives() and not service.restart):
                    raise FleetFailed(f"{member.name} did not start: {_last_line(member.log)} (all of it in {member.log})")
                self.tend()
                time.sleep(_LOOK_SECONDS)
        self.say(f"{', '.join(member.name for member in members)}: {'healthy' if service.restart else 'done'}")

    def _has_started(self, member: Member) -> bool:
        if member.service.restart:
            return self.is_healthy(member)
        return member.process is not None and member.process.poll() == 0

    def _write_state(self) -> None:
        """Who is who, for people and tests that end one of them."""
        processes = {
            name: {"pid": one.process.pid, "log": str(one.log)} for name, one in self.members.items() if one.process and one.lives()
        }
        path = self.place.directory / "fleet.json"
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps({"url": self.url, "processes": processes}, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)


def _end(member: Member, deadline: float) -> None:
    assert member.process is not None
    try:
        member.process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        member.process.kill()
        member.process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing in its log"
