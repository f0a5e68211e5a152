"""The processes of `up`: started, watched, restarted, stopped; the lock, the port, and the file that tells where the service is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cli.invocation import local_url
from cli.output import Output
from core.errors import DataDirectoryRefused, PortInUse
from core.settings import Settings

MODULES = {"api": "server", "worker": "workers"}
CANNOT_START = 2
LOOK_SECONDS = 0.1
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
# A child that lived this long was well; its next death is a new story.
HEALTHY_SECONDS = 60.0
PROBE_SECONDS = 3.0
PROBE_PATIENCE_SECONDS = 2.0
MISSES_OF_A_HUNG_CHILD = 8
"""In a row: half a minute without an answer, however long this process itself was frozen meanwhile."""
START_SECONDS = 120.0
"""A child that has never answered is given this long."""
PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def hold_lock(settings: Settings) -> Iterator[None]:
    """Be the only `up` on this data directory; DataDirectoryRefused while another one is."""
    path = settings.data_directory / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            who = f"process {holder}" if holder else "another process"
            message = f"another `noisy-student up` ({who}) holds the data directory {settings.data_directory}; stop it, or name another"
            raise DataDirectoryRefused(message) from error
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether an `up` is running over the directory of this lock file."""
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_port(settings: Settings) -> None:
    """PortInUse, in one line, when the API could not listen."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            message = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another port with --port"
            raise PortInUse(message) from error


def dying_with_parent(number: signal.Signals) -> Callable[[], None]:
    """What a child runs before its program: the kernel sends it this signal when this process ends, however that happens.

    Meant for parents with one thread, where running Python between fork and exec is safe.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None, use_errno=True)

    def ask_kernel() -> None:
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel


class Probe:
    """Asks /livez again and again without waiting for the answer: this process has one thread, and more than one child."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._asked: socket.socket | None = None
        self._next = 0.0
        self._answered = False
        self.misses = 0

    def look(self, now: float, *, child_seconds: float) -> None:
        """Ask, or see what came of it; `misses` counts the questions without a good answer since the last good one."""
        if self._asked is None:
            if now >= self._next:
                self._next = now + PROBE_SECONDS
                self._ask(child_seconds)
            return
        try:
            answer = self._asked.recv(64)
        except BlockingIOError:
            if now < self._next - PROBE_SECONDS + PROBE_PATIENCE_SECONDS:
                return
            answer = b""
        except OSError:
            answer = b""
        self._asked.close()
        self._asked = None
        self._note(child_seconds, good=b" 200 " in answer)

    def _ask(self, child_seconds: float) -> None:
        try:
            self._asked = socket.create_connection(self._address, timeout=0.5)
            self._asked.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            self._asked.setblocking(False)
        except OSError:
            self.close()
            self._note(child_seconds, good=False)

    def _note(self, child_seconds: float, *, good: bool) -> None:
        self._answered = self._answered or good
        missed = not good and (self._answered or child_seconds > START_SECONDS)
        self.misses = self.misses + 1 if missed else 0

    def has_answered(self) -> None:
        """Somebody else was answered: from now on silence counts."""
        self._answered = True

    def close(self) -> None:
        """Forget the question that is open."""
        if self._asked is not None:
            self._asked.close()
            self._asked = None


@dataclass
class Child:
    """One process that is kept alive."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    due: float = 0.0
    url: str | None = None
    """Where it answers /livez, if it does."""
    probe: Probe | None = None

    def start(self) -> None:
        """Start it; it dies with this process."""
        # Ctrl-C reaches the parent only, which stops the children in order.
        command = [sys.executable, "-m", MODULES[self.name]]
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=dying_with_parent(signal.SIGKILL))  # noqa: PLW1509  one thread
        self.started = time.monotonic()
        self.probe = None if self.url is None else Probe(self.url)

    def is_hung(self, now: float) -> bool:
        """Whether it lives, and has not answered for too long."""
        if self.probe is None:
            return False
        self.probe.look(now, child_seconds=now - self.started)
        return self.probe.misses >= MISSES_OF_A_HUNG_CHILD


class Service:
    """API and worker of one data directory."""

    def __init__(self, settings: Settings, output: Output) -> None:
        self.settings = settings
        self.output = output
        self.url = local_url(settings)
        self.children = [Child(name, url=self.url if name == "api" else None) for name in MODULES]
        self.stopping = 0
        self.ready = False

    def check_port(self) -> None:
        """PortInUse before anything is started."""
        check_port(self.settings)

    def run(self) -> int:
        """Keep the children alive until a signal comes; 0, or 2 when one of them cannot start."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)
        for child in self.children:
            child.start()
        code = 0
        try:
            while not self.stopping and code == 0:
                self._announce_when_ready()
                code = self._look_after_children()
                time.sleep(LOOK_SECONDS)
        finally:
            self.settings.service_file.unlink(missing_ok=True)
            self._stop_children()
        self.output.say("stopped" if code == 0 else "")
        return code

    def _stop(self, _number: int, _frame: object) -> None:
        self.stopping += 1

    def _announce_when_ready(self) -> None:
        if self.ready or not _answers(f"{self.url}/readyz"):
            return
        self.ready = True
        for child in self.children:
            if child.probe is not None:
                child.probe.has_answered()
        aside = self.settings.service_file.with_suffix(".incoming")
        aside.write_text(json.dumps({"url": self.url, "pid": os.getpid()}) + "\n", encoding="utf-8")
        os.replace(aside, self.settings.service_file)
        facts = {"url": self.url, "pid": os.getpid(), "data_directory": str(self.settings.data_directory.resolve())}
        if self.output.as_json:
            self.output.line(facts)
        else:
            self.output.say(f"noisy-student runs at {self.url}, its pages at {self.url}/docs, its data in {facts['data_directory']}")
            self.output.say("Ctrl-C stops it; running work writes a checkpoint and goes on at the next start")

    def _look_after_children(self) -> int:
        """Start again whatever died; 2 when a child says that it cannot start here."""
        now = time.monotonic()
        for child in self.children:
            if child.process is None:
                if now >= child.due:
                    child.start()
                continue
            code = child.process.poll()
            if code is None:
                if child.is_hung(now):
                    print(f"the {child.name} process does not answer any more; ending it", file=sys.stderr, flush=True)
                    child.process.kill()
                    child.process.wait()
                continue
            if code == CANNOT_START and not self.ready:
                return CANNOT_START
            lived = now - child.started
            child.pause_seconds = FIRST_PAUSE_SECONDS if lived > HEALTHY_SECONDS else min(2 * child.pause_seconds, LONGEST_PAUSE_SECONDS)
            child.process, child.due = None, now + child.pause_seconds
            print(f"the {child.name} process ended with {code}; starting it again", file=sys.stderr, flush=True)
        return 0

    def _stop_children(self) -> None:
        running = [child.process for child in self.children if child.process is not None]
        for process in running:
            process.terminate()
        if self.ready:
            self.output.say("stopping; running work writes its checkpoint")
        # The worker gives its attempts `grace_seconds` to write a checkpoint, and then needs a moment itself.
        deadline = time.monotonic() + self.settings.grace_seconds + 10
        asked = self.stopping
        for process in running:
            while process.poll() is None and time.monotonic() < deadline and self.stopping <= asked:
                time.sleep(0.05)
            if process.poll() is None:
                process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
