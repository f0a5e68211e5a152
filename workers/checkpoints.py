"""A training's newest checkpoint in storage, where hosts share nothing else: kept while it runs, brought back where it goes on.

In the job's folder lie `last.ckpt`, the best weights so far that it refers to (`best-….ckpt`), and the checkpoint before it, which a new
host can do without. Rows name them `checkpoint-ATTEMPT/…` on behalf of the job, so no sweep takes them.
"""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

from core.db import jobs
from core.db.files import list_files, replace_files
from core.db.retention import CHECKPOINT
from core.db.session import AWAY, Database
from core.db.tables import Job
from core.errors import StorageError
from core.logs import get_log
from core.storage import Storage, materialize

PREFIX = CHECKPOINT
_NAME = re.compile(rf"{PREFIX}(\d+)/(.+)")
_LOG = re.compile(r"attempt-(\d+)\.log")


class CheckpointKeeper:
    """Brings one attempt's checkpoints into storage, in a thread of its own: the newest that there is whenever it is free."""

    def __init__(self, database: Database, storage: Storage, job: Job, directory: Path) -> None:
        """`directory` is the job's folder."""
        self._database = database
        self._storage = storage
        self._job = job
        self._folder = directory / "checkpoints"
        self._aside = directory / f"outgoing-{job.attempt}"
        self._written = threading.Condition()
        self._waits = self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"checkpoints-{job.id}", daemon=True)

    def note(self) -> None:
        """The attempt has written a checkpoint."""
        with self._written:
            self._waits = True
            self._written.notify()
        if not self._thread.ident:
            self._thread.start()

    def finish(self) -> None:
        """Returns when the checkpoint that was noted last is kept, or cannot be."""
        with self._written:
            self._ending = True
            self._written.notify()
        if self._thread.ident:
            self._thread.join()

    def abandon(self) -> None:
        """Begin nothing more."""
        with self._written:
            self._waits, self._ending = False, True
            self._written.notify()

    def _run(self) -> None:
        while True:
            with self._written:
                self._written.wait_for(lambda: self._waits or self._ending)
                if not self._waits:
                    return
                self._waits = False
            try:
                self._keep()
            except (StorageError, *AWAY, OSError) as error:
                # The training goes on. Another checkpoint will come; without it, another host would begin a little earlier.
                get_log().warning("checkpoint.not_kept", job_id=self._job.id, error=str(error).splitlines()[0])

    def _keep(self) -> None:
        try:
            paths = snapshot(self._folder, self._aside)
            files = {f"{PREFIX}{self._job.attempt}/{path.name}": self._storage.put(path) for path in paths}
        finally:
            shutil.rmtree(self._aside, ignore_errors=True)
        with self._database.transaction() as session:
            if not jobs.report(session, self._job.id, token=self._job.token, items=[]):
                return
            replaced = replace_files(session, self._job.id, files, prefix=PREFIX)
        # A sweep would find it, but only after its grace period, and a checkpoint a minute is much until then. It holds seconds of
        # this very attempt, so nobody else is about to name the same; best weights can be those of another training with the same seed.
        for name, digest in replaced.items():
            if name.endswith("/last.ckpt"):
                self._storage.remove(digest)


def snapshot(folder: Path, aside: Path) -> list[Path]:
    """Hard links, in `aside`, to the files of the newest checkpoint, which are replaced and removed at any time where they are.

    The files that go with `last.ckpt` are those that lie there while it is not replaced; a few more do no harm.
    """
    while True:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        last = aside / "last.ckpt"
        last.hardlink_to(folder / "last.ckpt")
        for path in folder.glob("best-*.ckpt"):
            try:
                (aside / path.name).hardlink_to(path)
            except FileNotFoundError:
                continue
        if last.samefile(folder / "last.ckpt"):
            return sorted(aside.iterdir())


def restore_checkpoint(database: Database, storage: Storage, job: Job, directory: Path, abandoned: threading.Event) -> None:
    """Bring the job's newest checkpoint into its folder when a later attempt than this host's last one wrote it."""
    if storage.is_local:
        return
    with database.reading() as session:
        named = [(match, row.digest) for row in list_files(session, job.id) if (match := _NAME.fullmatch(row.name))]
    if not named:
        return
    attempt = max(int(match[1]) for match, _ in named)
    checkpoints, logs = directory / "checkpoints", directory.glob("attempt-*.log")
    ran_here = max((int(match[1]) for path in logs if (match := _LOG.fullmatch(path.name))), default=0)
    if (checkpoints / "last.ckpt").exists() and attempt <= ran_here:
        return
    brought = directory / f"incoming-{job.attempt}"
    materialize(storage, {match[2]: digest for match, digest in named if int(match[1]) == attempt}, brought)
    if abandoned.is_set():
        # The next attempt may be at work on what lies there now.
        shutil.rmtree(brought, ignore_errors=True)
        return
    shutil.rmtree(checkpoints, ignore_errors=True)
    brought.replace(checkpoints)
    get_log().info("checkpoint.restored", job_id=job.id, written_by_attempt=attempt)
