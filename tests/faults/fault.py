"""What every fault has: a name, what it concerns, where it can happen, and `strike`, which begins and ends it."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from tests.builders_services import wait_until
from tests.faults.ledger import Ledger
from tests.faults.load import Load
from tests.faults.members import Member
from tests.faults.stage import LEASE_SECONDS, Stage

BEYOND_LEASE_SECONDS = 1.5 * LEASE_SECONDS
BEYOND_LEASES_SECONDS = 3.2 * LEASE_SECONDS
"""Every lease that somebody could renew just before has run out, and those of whoever took over too."""
SQLITE, POSTGRESQL = ("sqlite",), ("postgresql",)
BOTH = SQLITE + POSTGRESQL
FOLDER, BUCKET = ("folder",), ("bucket",)


class NotNow(Exception):
    """There is nothing that this fault could hit; it does not count."""


class NotNoticed(Exception):
    """The service went on as if nothing had happened: that is a defect."""


@dataclass(slots=True)
class Scene:
    """What a fault may touch."""

    stage: Stage
    ledger: Ledger
    load: Load
    chance: random.Random
    victim: str
    """A generation whose files may be damaged."""
    broken: str
    """A generation whose network cannot be served."""
    number: int = 0
    """Of the fault, counted from 1."""

    def a_worker(self) -> Member:
        return self.chance.choice(self.stage.members.workers())

    def a_busy_worker(self) -> tuple[Member, int]:
        """A worker and its attempt's process; NotNow when none has one."""
        found = self.stage.members.busy_worker(seconds=15)
        if found is None:
            raise NotNow("no worker has an attempt")
        return found

    def training_child(self) -> tuple[str, int]:
        """The training that runs, when it has two checkpoints, and its process; NotNow when there is none."""
        training = next((job for job in self.stage.running().values() if job.kind == "train"), None)
        if training is None:
            raise NotNow("no training runs")
        folder = self.stage.data / "jobs" / training.id
        with suppress(AssertionError, OSError, ValueError):
            wait_until((folder / "checkpoints" / "last.1.ckpt").exists, seconds=40)
            pid = int((folder / "lock").read_text().partition(" ")[0])
            if any(pid in worker.children() for worker in self.stage.members.workers()):
                return training.id, pid
        raise NotNow("the training has no checkpoint")


class Fault(ABC):
    """One kind of bad luck."""

    name: ClassVar[str]
    concerns: ClassVar[str]
    """jobs, messages, storage, database, promotion or predictor."""
    databases: ClassVar[tuple[str, ...]] = BOTH
    storages: ClassVar[tuple[str, ...]] = FOLDER + BUCKET
    takes_minutes: ClassVar[bool] = False
    """It comes only when it is asked for by name."""
    needs_training: ClassVar[bool] = False

    @abstractmethod
    def strike(self, scene: Scene) -> dict[str, Any]:
        """Let it happen and be over; facts for the report."""


def beyond_lease(scene: Scene) -> None:
    """Long enough that whoever is silent meanwhile is given up on."""
    time.sleep(BEYOND_LEASE_SECONDS + scene.chance.random())
