"""What an operator does to a busy service: every process replaced one by one, a backup and a restore; and a job that nobody survives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from core.db.tables import Job
from tests.builders_services import wait_until
from tests.faults.fault import Fault, NotNoticed, NotNow, Scene
from tests.faults.faults_processes import end_by_signal
from tests.faults.members import REPOSITORY

LIVES = 2
"""Attempts that a poison job may lose."""
POISON_SECONDS = 60.0
COMMAND_SECONDS = 300.0
"""A backup fetches file by file, through a proxy, on a machine that does much else."""


class EveryProcessReplaced(Fault):
    """SIGTERM for one process after the other, as at every upgrade; each is back before the next one goes."""

    name, concerns = "all replaced one by one", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        statuses = {}
        for member in scene.stage.members.all.values():
            process, starts = member.process, member.starts
            assert process is not None
            member.killed.add(member.pid)
            member.signal(signal.SIGTERM)
            statuses[member.name] = process.wait(60)
            wait_until(lambda one=member, before=starts: one.starts > before, seconds=30, what=f"another {member.name}")
        if set(statuses.values()) != {0}:
            raise NotNoticed(f"asked to stop, they ended with {statuses}")
        return {"members": list(statuses)}


class BackedUp(Fault):
    """A backup is made under load and restored elsewhere, over SQLite and a folder: `doctor --verify` finds nothing there."""

    name, concerns = "backed up and restored", "storage"

    def strike(self, scene: Scene) -> dict[str, Any]:
        stage = scene.stage
        kept, there = stage.directory / f"kept-{scene.number}", stage.directory / f"there-{scene.number}"
        here = stage.members.api.environment
        elsewhere = {name: value for name, value in here.items() if name not in ELSEWHERE} | {"NOISY_STUDENT_DATA_DIRECTORY": str(there)}
        self._do(here, "backup", str(kept))
        self._do(elsewhere, "restore", str(kept))
        self._do(elsewhere, "doctor", "--verify")
        return {"megabytes": round(sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) / 1e6, 1)}

    def _do(self, environment: dict[str, str], *words: str) -> None:
        command = [sys.executable, "-m", "cli.main", *words]
        try:
            done = subprocess.run(
                command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise NotNoticed(f"{words[0]} has not ended after {COMMAND_SECONDS:.0f} s") from error
        if done.returncode != 0:
            raise NotNoticed(f"{words[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")


ELSEWHERE = ("NOISY_STUDENT_DATABASE_URL", "NOISY_STUDENT_REDIS_URL", "NOISY_STUDENT_STORAGE_URL", "NOISY_STUDENT_S3_ENDPOINT_URL")


class PoisonJob(Fault):
    """A job whose attempt dies each time: it fails after its attempts, and holds up nothing else."""

    name, concerns = "poison job", "jobs"

    def strike(self, scene: Scene) -> dict[str, Any]:
        stage = scene.stage
        one = scene.load.read_folder(f"poison-{scene.number}", "unlabeled", stage.images / "poison")
        one.may_fail = "attempt.lost"
        killed: set[int] = set()
        deadline = time.monotonic() + POISON_SECONDS
        while (job := (stage.find_jobs([one.id]) or {}).get(one.id)) is None or job.status in ("queued", "running"):
            if time.monotonic() > deadline:
                raise NotNoticed(f"after {len(killed)} dead attempts the job is {job.status if job else 'not there'}")
            killed |= self._kill(scene, one.id)
            time.sleep(0.005)
        if job.status != "failed":
            raise NotNow("its attempt was faster")
        return {"job": one.id, "attempts": job.attempt, "killed": len(killed)}

    def _kill(self, scene: Scene, job_id: str) -> set[int]:
        """The process that works at it now. Workers of a chaos run allow hundreds of attempts, from each claim on."""
        with suppress(OSError, ValueError):
            pid = int((scene.stage.data / "jobs" / job_id / "lock").read_text().partition(" ")[0])
            if b"workers.attempt" in Path(f"/proc/{pid}/cmdline").read_bytes():
                with scene.stage.database.transaction() as session:
                    session.execute(sa.update(Job).where(Job.id == job_id).values(max_attempts=LIVES))
                end_by_signal(pid)
                return {pid}
        return set()


KINDS: tuple[type[Fault], ...] = (EveryProcessReplaced, BackedUp, PoisonJob)
