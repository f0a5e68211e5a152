"""One chaos run over one database: set up, load, fault after fault, an orderly end, and a verdict."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from core.db.tables import Job, PseudoLabelSet, Run
from core.lifecycle import JOB_TERMINAL
from tests.builders_services import wait_until
from tests.faults.fault import Fault, NotNoticed, NotNow, Scene
from tests.faults.ledger import Ledger
from tests.faults.load import API, Load, Wants
from tests.faults.members import REPOSITORY
from tests.faults.oracle import Verdict, judge
from tests.faults.plan import draw_plan
from tests.faults.recovery import NotRecovered, wait_for_recovery
from tests.faults.stage import Stage, chance, set_up

END_SECONDS = 420.0
"""Until the last job has ended: a run with two trainings may have been interrupted just now."""
MAKE_TEACHER = (
    "import sys; from pathlib import Path; from tests.ml.builders_generations import build_generation; "
    "build_generation(Path(sys.argv[1]), class_names=('blue', 'green', 'red'))"
)


@dataclass(slots=True)
class Struck:
    """One fault, and what came of it."""

    number: int
    kind: str
    concerns: str
    at_seconds: float
    running: list[str]
    facts: dict[str, Any]
    recovery_seconds: float | None = None
    problem: str | None = None


@dataclass(slots=True)
class Outcome:
    """All of one database."""

    database: str
    storage: str
    seed: int
    seconds: float = 0.0
    struck: list[Struck] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    """Requests that started work, repetitions included."""
    moves: int = 0
    predictions: dict[str, int] = field(default_factory=dict)
    unasked_ends: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.broken)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ChaosRun:
    """Over one database."""

    def __init__(self, stage: Stage, *, minutes: float, kinds: Sequence[type[Fault]], trains: bool) -> None:
        self.stage = stage
        self.minutes = minutes
        self.kinds = kinds
        self.trains = trains
        self.outcome = Outcome(stage.kind, stage.storage_kind, stage.seed)
        self.ledger = Ledger()
        self.known_jobs: set[str] = set()
        self._put_off: list[type[Fault]] = []
        self._started = time.monotonic()

    def run(self) -> Outcome:
        scene = self._prepare()
        self._started = time.monotonic()
        scene.load.start()
        try:
            plan = draw_plan(self.kinds, self.stage.seed, self.stage.kind)
            while self._seconds() < 60 * self.minutes:
                if self.trains and self._seconds() < 45 * self.minutes:
                    self._keep_training(scene)
                kind = self._next(plan)
                if kind is None:
                    time.sleep(0.5)
                else:
                    self._strike(scene, kind())
        finally:
            scene.load.stop()
        self._end(scene)
        return self.outcome

    def _next(self, plan: Iterator[type[Fault]]) -> type[Fault] | None:
        """Of the plan; what needs a training has its turn as soon as one runs. None while everything waits for one."""
        training = any(job.kind == "train" for job in self.stage.running().values())
        if training and self._put_off:
            return self._put_off.pop()
        while not all(kind in self._put_off for kind in self.kinds):
            kind = next(plan)
            if training or not kind.needs_training:
                return kind
            self._put_off.append(kind)
        return None

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _prepare(self) -> Scene:
        """Generations to serve, datasets to use, processes."""
        stage = self.stage
        names = {stage.add_generation("right"): "red", stage.add_generation("wrong", rotate=1): "blue"}
        victim, broken = stage.add_generation("victim", rotate=2), stage.add_generation("broken", num_outputs=2)
        wants = Wants(generations=list(names), labels=names)
        if self.trains:
            wants.teacher = self._make_teacher()
        with stage.database.reading() as session:
            self.known_jobs = set(session.scalars(sa.select(Job.id)))
        load = Load(stage, self.ledger, wants)
        load.write_images()
        stage.start()
        if self.trains:
            kinds = {"run-labeled": "labeled", "run-pool": "unlabeled", "run-test": "evaluation"}
            asked = [load.read_folder(name, kind, stage.images / name) for name, kind in kinds.items()]
            wait_until(lambda: self._have_ended([one.id for one in asked]), seconds=60, what="the reading of the run's folders")
        wait_until(lambda: load.promote_once() == 200, seconds=30, what="the first promotion")
        return Scene(stage, self.ledger, load, chance(stage.seed, stage.kind, "faults"), victim, broken)

    def _make_teacher(self) -> str:
        folder = self.stage.directory / "teacher"
        subprocess.run([sys.executable, "-c", MAKE_TEACHER, str(folder)], check=True, cwd=REPOSITORY, timeout=180)
        return self.stage.register(folder, name="teacher", class_names=["blue", "green", "red"])

    def _have_ended(self, ids: list[str]) -> bool:
        found = self.stage.find_jobs(ids)
        return found is not None and all(job.status in JOB_TERMINAL for job in found.values())

    def _keep_training(self, scene: Scene) -> None:
        """One run at a time; one that failed because its training was killed twice at the same step is asked to go on."""
        if scene.load.run is not None:
            with self.stage.database.reading() as session:
                status = session.get_one(Run, scene.load.run.id).status
            if status == "active":
                return
            if status == "failed":
                self._retry(scene)
                return
        scene.load.start_run()

    def _retry(self, scene: Scene) -> None:
        assert scene.load.run is not None
        with self.stage.database.reading() as session:
            query = sa.select(Job.id, Job.error).where(Job.run_id == scene.load.run.id, Job.status == "failed")
            failed = session.execute(query).first()
        if failed is None:
            return
        if (failed.error or {}).get("code") != "attempt.lost":
            self.ledger.complain(f"job {failed.id} of {scene.load.run.id} failed: {failed.error}")
        with self.stage.client() as client:
            client.post(f"{API}/jobs/{failed.id}/retry", json={})

    def _strike(self, scene: Scene, fault: Fault) -> None:
        """One fault from its beginning to the recovery after it."""
        members = self.stage.members
        scene.number += 1
        running = self.stage.running()
        members.fault_now = fault.name
        kinds = sorted(job.kind for job in running.values())
        struck = Struck(scene.number, fault.name, fault.concerns, round(self._seconds(), 1), kinds, {})
        try:
            struck.facts = fault.strike(scene)
            struck.recovery_seconds = round(wait_for_recovery(scene, running), 2)
        except NotNow:
            self.outcome.skipped[fault.name] = self.outcome.skipped.get(fault.name, 0) + 1
            return
        except (NotRecovered, NotNoticed, AssertionError, httpx.HTTPError) as error:
            struck.problem = f"{type(error).__name__}: {error}"
            self.ledger.complain(f"{fault.name} (number {struck.number}): {struck.problem}")
        finally:
            members.fault_now = None
        self.outcome.struck.append(struck)
        took = "not recovered" if struck.recovery_seconds is None else f"{struck.recovery_seconds:5.1f} s"
        print(f"{self.stage.kind:10} {struck.at_seconds:7.1f} s  {fault.name:28} {took}  {struck.problem or struck.facts}", flush=True)

    def _end(self, scene: Scene) -> None:
        """Everything that was accepted comes to its end; then the processes stop and the rows are judged."""
        outcome = self.outcome
        deadline = time.monotonic() + END_SECONDS
        while (left := self._unfinished()) and time.monotonic() < deadline:
            if self.trains and scene.load.run is not None:
                self._keep_run_going(scene)
            time.sleep(0.5)
        outcome.seconds = round(self._seconds(), 1)
        self.stage.members.stop()
        outcome.unasked_ends = self.stage.members.unasked
        verdict = self._judge()
        outcome.lost, outcome.doubled, outcome.broken = verdict.lost, verdict.doubled, verdict.broken
        outcome.lost += [f"{one} has not ended {END_SECONDS:.0f} s after the last fault" for one in left]
        outcome.broken += [f"{one['member']} ended by itself with {one['status']}" for one in outcome.unasked_ends if one["during"] is None]
        outcome.accepted, outcome.moves = self.ledger.nouns(), len(self.ledger.moves)
        outcome.sent = sum(one.sent for one in self.ledger.accepted)
        outcome.predictions = dict(sorted(self.ledger.predictions.items()))

    def _keep_run_going(self, scene: Scene) -> None:
        assert scene.load.run is not None
        with self.stage.database.reading() as session:
            failed = session.get_one(Run, scene.load.run.id).status == "failed"
        if failed:
            self._retry(scene)

    def _judge(self) -> Verdict:
        """The runner's own eyes, and the command that people use."""
        verdict = judge(self.stage, self.ledger, known_jobs=self.known_jobs)
        environment = self.stage.members.api.environment | {"NOISY_STUDENT_DATABASE_URL": self.stage.database_url}
        command = [sys.executable, "-m", "cli.main", "doctor", "--verify"]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            verdict.broken.append(f"doctor --verify ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
        return verdict

    def _unfinished(self) -> list[str]:
        """Jobs, sets and runs that go on."""
        with self.stage.database.reading() as session:
            found = list(session.scalars(sa.select(Job.id).where(Job.status.not_in(JOB_TERMINAL))))
            found += session.scalars(sa.select(PseudoLabelSet.id).where(PseudoLabelSet.status.in_(("labeling", "selecting"))))
            found += session.scalars(sa.select(Run.id).where(Run.status == "active"))
        failed = self.trains and self._failed_runs()
        return found + (failed or [])

    def _failed_runs(self) -> list[str]:
        with self.stage.database.reading() as session:
            return list(session.scalars(sa.select(Run.id).where(Run.status == "failed")))


def run_chaos(
    database: str,
    storage: str,
    *,
    seed: int,
    minutes: float,
    kinds: Sequence[type[Fault]],
    trains: bool,
    num_workers: int,
    logs: Path | None,
) -> Outcome:
    """Over one database; the processes' logs go to `logs` when something was wrong."""
    with set_up(database, storage, seed=seed, num_workers=num_workers) as stage:
        outcome = ChaosRun(stage, minutes=minutes, kinds=kinds, trains=trains).run()
        if logs is not None and not outcome.is_clean:
            keep_logs(stage, logs / database)
        return outcome


def keep_logs(stage: Stage, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in stage.directory.glob("*.log"):
        (folder / path.name).write_bytes(path.read_bytes())
