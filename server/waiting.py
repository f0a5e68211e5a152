"""Why queued jobs wait, in words. Jobs and queues ask the same function, in a fixed number of queries however many jobs there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.jobs import can_start
from core.db.pseudo_labels import HELD_UNTIL
from core.db.session import now
from core.db.tables import Job, Run, Worker
from core.settings import Settings

SILENT_SECONDS = 60.0
"""A worker that was not seen for this long (or for a lease, if that is longer) counts as gone."""
LOOK_AHEAD = 1000
"""Jobs that are counted before a waiting one; who has more before it is told just that."""

Code = Literal[
    "run_not_active", "set_unwritten", "pause_after_failure", "no_worker", "workers_drain", "protocol_too_new", "slots_busy", "starting"
]


@dataclass(frozen=True, slots=True)
class Wait:
    """All that matters of a queued job."""

    capability: str
    protocol: int
    run_status: str
    """`active` also for a job without a run."""
    pause_until: datetime | None
    """None when it does not pause after a failed attempt."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why it waits: a code for programs, words for people."""

    code: Code
    message: str


@dataclass(frozen=True, slots=True)
class Fleet:
    """The live workers, and how many jobs each of them runs, at one moment."""

    moment: datetime
    workers: Sequence[Worker]
    running: Mapping[str, int]
    """Jobs by the name of the worker that runs them."""

    def able(self, capability: str) -> list[Worker]:
        """Live workers that have it, draining ones included."""
        return [worker for worker in self.workers if capability in worker.capabilities]

    def free_slots(self, workers: Sequence[Worker]) -> int:
        """Slots of these workers that run nothing and may take a job."""
        return sum(max(0, one.slots - self.running.get(one.name, 0)) for one in workers if one.draining_at is None)

    def explain(self, wait: Wait) -> Reason:
        """The first thing that keeps such a job from running."""
        capability, able = wait.capability, self.able(wait.capability)
        taking = [worker for worker in able if worker.draining_at is None]
        reading = [worker for worker in taking if worker.protocol >= wait.protocol]
        if wait.run_status != "active":
            return Reason("run_not_active", f"its run is {wait.run_status}")
        if wait.pause_until is not None and wait.pause_until > self.moment:
            if wait.pause_until >= HELD_UNTIL:
                return Reason("set_unwritten", "the other labeling jobs of its set, which are not all written down yet")
            seconds, until = (wait.pause_until - self.moment).total_seconds(), wait.pause_until.astimezone(UTC)
            message = f"a pause of {seconds:.0f} more seconds after a failed attempt, until {until:%Y-%m-%dT%H:%M:%SZ}"
            return Reason("pause_after_failure", message)
        if not able:
            return Reason("no_worker", f"no worker with capability {capability}")
        if not taking:
            drain = "the only worker drains" if len(able) == 1 else f"all {len(able)} workers drain"
            return Reason("workers_drain", f"a worker with capability {capability} that takes jobs: {drain}")
        if not reading:
            newest = max(worker.protocol for worker in taking)
            message = f"a newer worker with capability {capability}: it is written in protocol {wait.protocol}, they read up to {newest}"
            return Reason("protocol_too_new", message)
        slots, free = sum(worker.slots for worker in reading), self.free_slots(reading)
        if free == 0:
            return Reason("slots_busy", f"a free slot (with capability {capability}: 0 of {slots})")
        return Reason("starting", f"a worker's next look (free slots with capability {capability}: {free} of {slots})")


def live_workers(session: Session, settings: Settings) -> sa.Select[Worker]:
    """Workers that neither said good-bye nor fell silent."""
    oldest = now(session) - timedelta(seconds=max(SILENT_SECONDS, settings.lease_seconds))
    return sa.select(Worker).where(Worker.stopped_at.is_(None), Worker.seen_at >= oldest)


def read_fleet(session: Session, settings: Settings) -> Fleet:
    """Who is there now."""
    running = sa.select(Job.lease_holder, sa.func.count()).where(Job.status == "running").group_by(Job.lease_holder)
    workers = list(session.scalars(live_workers(session, settings)))
    return Fleet(now(session), workers, {name or "": number for name, number in session.execute(running)})


def explain_jobs(session: Session, queued: Sequence[Job], settings: Settings) -> dict[str, str]:
    """Why each of these queued jobs waits, and how many come before it where that is the reason."""
    fleet = read_fleet(session, settings)
    runs = {job.run_id for job in queued if job.run_id is not None}
    status_of_run = dict(session.execute(sa.select(Run.id, Run.status).where(Run.id.in_(runs))).all()) if runs else {}
    reasons = {}
    # Of fifty jobs in line most wait alike, and there may be hundreds of workers to look at.
    explain = cache(fleet.explain)
    for job in queued:
        pauses = job.not_before is not None and job.not_before > fleet.moment
        status = status_of_run.get(job.run_id or "", "active")
        reasons[job.id] = explain(Wait(job.capability, job.protocol, status, job.not_before if pauses else None))
    in_line = {job.capability for job in queued if reasons[job.id].code == "slots_busy"}
    places = {capability: _read_places(session, capability, fleet.moment) for capability in sorted(in_line)}
    return {
        job.id: reasons[job.id].message + (_tell_place(places[job.capability].get(job.id)) if reasons[job.id].code == "slots_busy" else "")
        for job in queued
    }


def _read_places(session: Session, capability: str, moment: datetime) -> dict[str, int]:
    """How many jobs come before each of the first ones that a worker with this capability would take."""
    query = sa.select(Job.id).where(*can_start(moment), Job.capability == capability)
    first = session.scalars(query.order_by(Job.priority.desc(), Job.id).limit(LOOK_AHEAD))
    return {job_id: place for place, job_id in enumerate(first)}


def _tell_place(place: int | None) -> str:
    if place is None:
        return f", {LOOK_AHEAD} jobs or more come before it"
    if place == 0:
        return ", and it is the next one"
    return ", 1 job comes before it" if place == 1 else f", {place} jobs come before it"


QueueCounts = list[tuple[Wait, int]]
"""Kinds of waiting, and how many jobs wait so."""


def count_queued(session: Session) -> QueueCounts:
    """Every queued job, by all that matters of it; of those that pause, the end of the first pause."""
    pause_until = sa.case((Job.not_before > now(session), Job.not_before), else_=None).label("pause_until")
    status = sa.func.coalesce(Run.status, "active").label("run_status")
    queued = sa.select(Job.capability, Job.protocol, status, pause_until).outerjoin(Run, Run.id == Job.run_id).where(Job.status == "queued")
    each = queued.subquery()
    kinds = (each.c.capability, each.c.protocol, each.c.run_status, each.c.pause_until.is_not(None))
    first_end = sa.func.min(each.c.pause_until, type_=each.c.pause_until.type)
    rows = session.execute(sa.select(*kinds, first_end, sa.func.count()).group_by(*kinds))
    return [(Wait(capability, protocol, run_status, until), number) for capability, protocol, run_status, _, until, number in rows]


def explain_queues(fleet: Fleet, counts: QueueCounts) -> dict[str, dict[Reason, int]]:
    """By capability: why its queued jobs wait, and how many for each reason."""
    found: dict[str, dict[Reason, int]] = {}
    for wait, number in counts:
        reason = fleet.explain(wait)
        reasons = found.setdefault(wait.capability, {})
        reasons[reason] = reasons.get(reason, 0) + number
    return found
