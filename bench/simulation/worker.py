"""Simulated workers: they claim, beat, report and end as real ones do, through the service's own code; only the work is pretended."""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
from typing import Any

from bench.simulation.fates import Fate, fate_of
from bench.simulation.hints import Bell, consume
from bench.simulation.keeper import TimedHousekeeping
from bench.simulation.plan import SHARD_SIZE, Notes, Shared
from core.db import jobs
from core.db.session import Database
from core.db.tables import Job
from core.db.workers import WorkerDescription, register_worker, see_worker
from core.logs import configure_logs
from core.queue import make_queue
from core.version import VERSION
from workers.outcomes import record_success, write_reports
from workers.progress import Reports
from workers.supervisor import SEEN_SECONDS

CAPABILITIES = ("cpu",)
HOST_WORKERS = 8
"""So many share connections and one housekeeping, as the slots of a host do: a pool of ten serves them without opening and closing any."""


class Crew:
    """The workers of one process."""

    def __init__(self, shared: Shared, number: int, size: int) -> None:
        self.shared, self.number = shared, number
        self.notes = Notes()
        self.bell = Bell()
        self.database = Database(shared.settings.resolved_database_url)
        self.queue = make_queue(shared.settings.redis_url)
        hosts = [Host(self, f"host-{number}-{place}") for place in range(0, size, HOST_WORKERS)]
        self.workers = [SimulatedWorker(self, f"{number}-{place}", hosts[place // HOST_WORKERS]) for place in range(size)]
        self._hosts = hosts

    def run(self) -> None:
        """Work until the simulation ends."""
        size = len(self.workers)
        helpers = [
            threading.Thread(target=consume, args=(self.shared, self.database, self.bell, self.notes), kwargs={"num_workers": size}),
            threading.Thread(target=self._keep_seen),
        ]
        for host in self._hosts:
            host.house.start()
        for thread in (*self.workers, *helpers):
            thread.start()
        with self.shared.ready.get_lock():
            self.shared.ready.value += 1
        self.shared.stop.wait()
        self.bell.stop()
        for thread in (*self.workers, *helpers):
            thread.join()
        for host in self._hosts:
            host.house.stop()
            host.database.close()
        self.database.close()

    def _keep_seen(self) -> None:
        """Each worker is seen as often as a real one, one after the other."""
        pause = SEEN_SECONDS / len(self.workers)
        while True:
            for worker in self.workers:
                if self.shared.stop.wait(pause):
                    return
                if worker.row_id is not None:
                    with self.database.transaction() as session:
                        see_worker(session, worker.row_id)


class Host:
    """What the workers of one host share."""

    def __init__(self, crew: Crew, name: str) -> None:
        self.database = Database(crew.shared.settings.resolved_database_url)
        self.house = TimedHousekeeping(crew.shared.settings, self.database, crew.queue, crew.notes, holder=name)


class SimulatedWorker(threading.Thread):
    """One slot. When it dies it comes back as another worker."""

    def __init__(self, crew: Crew, name: str, host: Host) -> None:
        super().__init__(name=name)
        self._crew, self._shared, self._plan = crew, crew.shared, crew.shared.plan
        self._notes, self._database, self._house = crew.notes, host.database, host.house
        self._life = 0
        self.row_id: str | None = None
        self._holder = name

    def run(self) -> None:
        try:
            self._shared.begin.wait()
            # A fleet does not start within one moment.
            self._shared.stop.wait(random.uniform(0, self._plan.work_seconds))
            self._begin_life()
            hint = None
            while not self._shared.stop.is_set():
                self._wait_while_paused()
                job = self._claim(hint)
                while job is not None:
                    job = self._work(job)
                hint = self._crew.bell.wait(self._shared.settings.resolved_poll_seconds * random.uniform(0.75, 1.0))
        except Exception:  # a simulation in which anybody stumbles has failed, and says where
            self._notes.errors.append(traceback.format_exc())

    def _begin_life(self) -> None:
        self._life += 1
        self._holder = f"{self.name}-{self._life}"
        description = WorkerDescription(
            name=self._holder, host="simulated", boot_id="simulated", pid=os.getpid(), capabilities=CAPABILITIES, slots=1, version=VERSION
        )
        with self._database.transaction() as session:
            self.row_id = register_worker(session, description).id

    def _wait_while_paused(self) -> None:
        while self._shared.pause.is_set() and not self._shared.stop.wait(0.1):
            pass

    def _claim(self, hint: str | None = None, *, set_id: str | None = None) -> Job | None:
        """As workers.slots.Slot does: priority decides, not whose hint came first."""
        held: dict[str, Any] = {
            "holder": self._holder,
            "capabilities": CAPABILITIES,
            "lease_seconds": self._plan.lease_seconds,
            "max_attempts": self._shared.settings.max_attempts,
        }
        with self._notes.timed("claim"), self._database.transaction() as session:
            if set_id is not None:
                return jobs.claim(session, **held, pseudo_label_set_id=set_id)
            found = jobs.claim(session, **held)
            return found or (jobs.claim(session, **held, job_id=hint) if hint else None)

    def _work(self, job: Job) -> Job | None:
        """One attempt; the set's next shard when there is one."""
        fate = fate_of(self._plan.seed, job.step or "", job.part or 0, job.attempt)
        self._notes.count(fate.kind)
        reports = self._pretend(job, fate)
        if fate.kind == "dies":
            # Nobody hears of it again.
            self._shared.stop.wait(self._plan.restart_seconds)
            self._begin_life()
            return None
        if fate.kind == "freezes":
            self._sleep_until_given_up(job)
        ended = None if reports is None else self._end(job, reports)
        if fate.kind == "freezes":
            self._notes.count("late results fenced" if ended is None else "late results taken")
        elif ended is None:
            self._notes.count("lost without a reason")
        if ended is not None:
            if job.kind == "label":
                with self._shared.done.get_lock():
                    self._shared.done.value += 1
            self._house.follow(ended)
        if fate.kind == "repeats":
            self._notes.count("repeated results fenced" if self._end(job, Reports()) is None else "repeated results taken")
        if job.kind != "label" or ended is None or self._shared.pause.is_set() or self._shared.stop.is_set():
            return None
        return self._claim(set_id=job.pseudo_label_set_id)

    def _pretend(self, job: Job, fate: Fate) -> Reports | None:
        """Let the time go by and beat meanwhile; what is left to report, None when fenced.

        A slow attempt takes longer than its lease, one that is lost stops midway.
        """
        total = self._plan.work_seconds * fate.work
        if fate.kind == "slow":
            total = max(total, 1.5 * self._plan.lease_seconds)
        if fate.is_lost:
            total /= 2
        reports, started = Reports(), time.monotonic()
        reports.take({"type": "runtime", "runtime": job.input.get("runtime") or {"device": "cpu"}})
        reports.take({"type": "event", "kind": "stage", "data": {"stage": "labeling" if job.kind == "label" else "training"}})
        while (elapsed := time.monotonic() - started) < total:
            time.sleep(min(self._plan.report_seconds, total - elapsed))
            share = min(1.0, (time.monotonic() - started) / total)
            done = {"done": round(share * SHARD_SIZE), "total": SHARD_SIZE, "unit": "images"}
            reports.take({"type": "event", "kind": "progress", "data": done})
            if share < 1 and not self._beat(job, reports):
                return None
        return reports

    def _beat(self, job: Job, reports: Reports) -> bool:
        with self._notes.timed("report"), self._database.transaction() as session:
            row = write_reports(session, job, reports, lease_seconds=self._plan.lease_seconds)
        reports.written()
        return row is not None

    def _sleep_until_given_up(self, job: Job) -> None:
        time.sleep(self._plan.lease_seconds)
        while self._holds(job):
            time.sleep(0.5)

    def _holds(self, job: Job) -> bool:
        with self._database.reading() as session:
            row = jobs.get_job(session, job.id)
            return (row.status, row.token) == ("running", job.token)

    def _end(self, job: Job, reports: Reports) -> Job | None:
        """Write the result; None when fenced."""
        made, files = pretended_result(job, self._shared.stored)
        with self._notes.timed("end"), self._database.transaction() as session:
            kept = write_reports(session, job, reports, lease_seconds=self._plan.lease_seconds)
            return None if kept is None else record_success(session, job, made, files, {})


def pretended_result(job: Job, stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a real attempt of this kind would have made: (result, stored files)."""
    if job.kind == "label":
        return {"num_rows": SHARD_SIZE}, {"shard.parquet": stored}
    if job.kind == "select":
        return {"report": {"num_unique": SHARD_SIZE, "num_rows": SHARD_SIZE}}, {"selected.parquet": stored, "items.parquet": stored}
    measured = {"top1": 0.5, "interval": [0.4, 0.6], "num_images": 100}
    metrics = {"role": job.input["role"], "architecture": "test_resnet", "num_parameters": 10, "validation": measured}
    return {"metrics": metrics, "class_names": ["cat", "dog"], "lineage": {}}, {"model.safetensors": stored}


def work(shared: Shared, number: int, size: int) -> None:
    """A process of simulated workers."""
    configure_logs(json_lines=True)
    crew = Crew(shared, number, size)
    try:
        crew.run()
    except Exception:  # likewise
        crew.notes.errors.append(traceback.format_exc())
    finally:
        crew.notes.write(shared.directory / f"crew-{number}.notes.json")
