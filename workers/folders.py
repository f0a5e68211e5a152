"""A job's folder on this host, or on a volume that hosts share: one attempt at a time works in it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.processes import boot_identity, start_ticks

PREDECESSOR_SECONDS = 10.0
"""As long as the loader processes of one that was killed may hold its folder."""
ELSEWHERE_SECONDS = 1.0
"""What cannot be killed from here ends when its own supervisor notices: only its name, written a moment late, is waited for."""


_OWN = re.compile(r"(?:inputs|incoming|outgoing)(?:-(\d+))?")
"""Folders within a job's that belong to one attempt; those without a number were made by versions that knew one of each."""


def drop_leftovers(directory: Path, attempt: int) -> None:
    """Remove what attempts up to this one had for themselves in the job's folder: their claims are over, or have brought nothing yet."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if (match := _OWN.fullmatch(path.name)) and int(match[1] or 0) <= attempt:
            shutil.rmtree(path, ignore_errors=True)


class FolderBusy(Exception):
    """Another process holds the folder, and does not end: one of another host or container, which nobody can kill from here."""


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Be the only attempt in the job's folder: one of this machine whose supervisor was frozen and given up on is killed."""
    # Opened for appending: truncating would erase the name of a process that still holds the lock.
    with (directory / "lock").open("a+") as lock:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                lock.seek(0)
                said = lock.read()
                _kill_predecessor(said)
                elsewhere = bool(said) and not said.endswith(boot_identity())
                if time.monotonic() - started > (ELSEWHERE_SECONDS if elsewhere else PREDECESSOR_SECONDS):
                    raise FolderBusy(f"{directory} is held by another process: {said or 'one that has not said which'}") from error
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(_name_of(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            # This process may go on with another job, and must not be killed for what somebody else does here next. It has said how its
            # attempt ended, so a disk that fails now is no second end.
            with suppress(OSError):
                lock.truncate(0)


@contextmanager
def left_alone(directory: Path) -> Iterator[bool]:
    """Whether nobody works in the folder, and then nobody begins to before the end of the block. Waits for nobody."""
    try:
        # Only opened: a full disk makes no lock, and where there is none no attempt has ever worked.
        lock = (directory / "lock").open("r+")
    except OSError as error:
        yield isinstance(error, FileNotFoundError) and directory.is_dir()
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _name_of(pid: int) -> str:
    """Id, start, boot and pid space: in another container, or after a boot, the same id is somebody else's."""
    return f"{pid} {start_ticks(pid)} {boot_identity()}"


def _kill_predecessor(said: str) -> None:
    pid = said.partition(" ")[0]
    try:
        if pid.isdecimal() and said == _name_of(int(pid)):
            os.killpg(int(pid), signal.SIGKILL)
    except OSError:
        return
