"""Processes that are killed, frozen or told the wrong time, and jobs that are canceled at the worst moments."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from tests.faults.fault import Fault, NotNow, Scene, beyond_lease
from tests.faults.members import Member

HOUR = 3600


def end_by_signal(pid: int, number: int = signal.SIGKILL) -> None:
    """It may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class WorkerKilled(Fault):
    """SIGKILL of a worker; its attempt dies with it."""

    name, concerns = "worker killed", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker, _ = scene.a_busy_worker()
        worker.kill()
        return {"member": worker.name}


class ChildKilled(Fault):
    """SIGKILL of an attempt's process alone."""

    name, concerns = "attempt killed", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker, child = scene.a_busy_worker()
        end_by_signal(child)
        return {"member": worker.name}


class ApiKilled(Fault):
    """SIGKILL of the API under load."""

    name, concerns = "API killed", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        scene.stage.members.api.kill()
        return {}


class HousekeeperKilled(Fault):
    """SIGKILL of whoever holds the singleton lease, and of its successor."""

    name, concerns = "housekeeping killed", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        killed = []
        for _ in range(2):
            holder = scene.stage.housekeeper()
            if holder is not None:
                holder.kill()
                killed.append(holder.name)
            time.sleep(0.5)
        if not killed:
            raise NotNow("nobody holds the singleton lease")
        return {"members": killed}


class EverythingKilled(Fault):
    """SIGKILL of every process at one moment, as in a power cut."""

    name, concerns = "everything killed", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        members = list(scene.stage.members.all.values())
        for member in members:
            member.signal(signal.SIGKILL)
        return {"members": [member.name for member in members]}


class WorkerStopped(Fault):
    """SIGTERM, as at every upgrade: the attempt is interrupted, handed over and costs nothing."""

    name, concerns = "worker replaced", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker, _ = scene.a_busy_worker()
        assert worker.process is not None
        worker.killed.add(worker.pid)
        worker.signal(signal.SIGTERM)
        return {"member": worker.name, "status": worker.process.wait(60)}


def freeze(scene: Scene, pid: int) -> None:
    end_by_signal(pid, signal.SIGSTOP)
    beyond_lease(scene)
    end_by_signal(pid, signal.SIGCONT)


class WorkerFrozen(Fault):
    """SIGSTOP of a worker beyond its lease, then SIGCONT: it finds itself fenced."""

    name, concerns = "worker frozen", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker, _ = scene.a_busy_worker()
        freeze(scene, worker.pid)
        return {"member": worker.name}


class ChildFrozen(Fault):
    """SIGSTOP of an attempt's process for longer than a lease, then SIGCONT."""

    name, concerns = "attempt frozen", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker, child = scene.a_busy_worker()
        freeze(scene, child)
        return {"member": worker.name}


class ApiFrozen(Fault):
    """SIGSTOP of the API, then SIGCONT."""

    name, concerns = "API frozen", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        freeze(scene, scene.stage.members.api.pid)
        return {}


class ClockOff(Fault):
    """A worker's clock is an hour off, ahead or behind, while it works."""

    name, concerns = "clock off", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        worker: Member = scene.a_worker()
        seconds = scene.chance.choice((HOUR, -HOUR))
        worker.wish(clock_seconds=seconds)
        beyond_lease(scene)
        worker.wish()
        return {"member": worker.name, "seconds": seconds}


class CancelRaces(Fault):
    """Jobs are canceled as they are claimed, while they run and as they finish."""

    name, concerns = "cancel races", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        asked = []
        for part in range(3):
            one = scene.load.add_dataset(1_000_000 + 10 * scene.number + part)
            # From the moment of the claim to that of the end, wherever these are today.
            time.sleep(scene.chance.uniform(0, 1.5))
            scene.load.cancel(one)
            asked.append(one.id)
        return {"jobs": asked}


KINDS: tuple[type[Fault], ...] = (
    WorkerKilled,
    ChildKilled,
    ApiKilled,
    HousekeeperKilled,
    EverythingKilled,
    WorkerStopped,
    WorkerFrozen,
    ChildFrozen,
    ApiFrozen,
    ClockOff,
    CancelRaces,
)
