"""A full disk, and files whose bits are not what they were: in storage they must be noticed, in a checkpoint survived."""

from __future__ import annotations

import os
import signal
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import sqlalchemy as sa

from cli.verify import find_defects
from core.db.events import list_job_events
from core.db.tables import StoredFile
from tests.builders_services import wait_until
from tests.faults.fault import BEYOND_LEASE_SECONDS, Fault, NotNoticed, Scene
from tests.faults.faults_processes import end_by_signal

SEEN_SECONDS = 90.0


class DiskFull(Fault):
    """No room for a while: not for rows, not for objects, not for checkpoints."""

    name, concerns = "disk full", "storage"

    def strike(self, scene: Scene) -> dict[str, Any]:
        scene.stage.fill_disk()
        time.sleep(BEYOND_LEASE_SECONDS)
        scene.stage.free_disk()
        return {"for_real": scene.stage.has_disk_of_its_own}


def flip(path: Path, chance: Any) -> None:
    """Change one bit in place."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))
    path.chmod(mode)


@contextmanager
def damaged(scene: Scene, how: Literal["flipped", "removed"]) -> Iterator[str]:
    """The network of a generation that nobody has asked for yet, for the length of a block; yields its digest."""
    stage = scene.stage
    with stage.database.reading() as session:
        named = sa.select(StoredFile.digest).where(StoredFile.owner_id == scene.victim, StoredFile.name == "model.onnx")
        digest: str = session.scalars(named).one()
    path = stage.path_of(digest)
    content, aside = path.read_bytes(), path.with_name(f"{path.name}.kept")
    if how == "removed":
        path.rename(aside)
    else:
        flip(path, scene.chance)
    try:
        yield digest
    finally:
        if how == "removed":
            aside.rename(path)
        else:
            path.chmod(0o644)
            path.write_bytes(content)
            path.chmod(0o444)


class ObjectDamaged(Fault):
    """A stored file is changed or gone; whoever needs it must say so, and `doctor --verify` must name it. Then it is put back."""

    concerns = "storage"
    how: Literal["flipped", "removed"]

    def strike(self, scene: Scene) -> dict[str, Any]:
        stage = scene.stage
        with damaged(scene, self.how) as digest, stage.client(timeout=30) as client:
            answer = wait_until(lambda: _definite(client, scene.victim), seconds=30, what="an answer about a damaged generation")
            found = find_defects(stage.database, stage.storage, orphan_seconds=stage.settings.orphan_grace_seconds)
        if answer.json().get("code") != "storage_damaged":
            raise NotNoticed(f"/predict answered {answer.status_code} {answer.text[:200]} from a file that was {self.how}")
        if not any(digest in defect.message for defect in found):
            raise NotNoticed(f"doctor --verify did not name the file {digest} that was {self.how}")
        others = [defect for defect in found if digest not in defect.message]
        if others:
            raise NotNoticed(f"doctor --verify found more than that: {others[:5]}")
        return {"digest": digest}


def _definite(client: Any, generation_id: str) -> Any:
    with suppress(httpx.TransportError):
        answer = client.post("/predict", params={"generation": generation_id}, content=b"no image, and nobody gets so far")
        return answer if answer.status_code != 503 else None
    return None


class ObjectFlipped(ObjectDamaged):
    """One bit."""

    name, how = "stored file flipped", "flipped"


class ObjectRemoved(ObjectDamaged):
    """The whole file."""

    name, how = "stored file removed", "removed"


class CheckpointDamaged(Fault):
    """The newest checkpoint of a training is damaged between two attempts; the next one goes on from the one before."""

    concerns, needs_training = "storage", True

    @abstractmethod
    def damage(self, path: Path, scene: Scene) -> None:
        """Make of the file what a failing disk makes of it."""

    def strike(self, scene: Scene) -> dict[str, Any]:
        job_id, child = scene.training_child()
        os.kill(child, signal.SIGSTOP)
        path = scene.stage.data / "jobs" / job_id / "checkpoints" / "last.ckpt"
        # The one before shares nothing with it: a name replaced, not a file rewritten.
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        self.damage(path, scene)
        with scene.stage.database.reading() as session:
            before = len(list_job_events(session, job_id, after=0, limit=100_000))
        end_by_signal(child)
        wait_until(lambda: self._noticed(scene, job_id, before), seconds=SEEN_SECONDS, what="a word about the damaged checkpoint")
        return {"job": job_id}

    def _noticed(self, scene: Scene, job_id: str, before: int) -> bool:
        with scene.stage.database.reading() as session:
            events = list_job_events(session, job_id, after=before, limit=1000)
        return any(event.data.get("code") == "checkpoint.damaged" for event in events) or scene.stage.over.is_set()


class CheckpointTruncated(CheckpointDamaged):
    """Cut in half."""

    name = "checkpoint truncated"

    def damage(self, path: Path, scene: Scene) -> None:
        os.truncate(path, path.stat().st_size // 2)


class CheckpointFlipped(CheckpointDamaged):
    """One bit."""

    name = "checkpoint flipped"

    def damage(self, path: Path, scene: Scene) -> None:
        flip(path, scene.chance)


KINDS: tuple[type[Fault], ...] = (DiskFull, ObjectFlipped, ObjectRemoved, CheckpointTruncated, CheckpointFlipped)
