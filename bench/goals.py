"""The goals as data, what was measured against them, and whether every miss is explained in bench/shortfalls.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

_HEADING = re.compile(r"^#{1,6} (.*)$")
_TABLE_ROW = re.compile(r"^\|.*\d.*\|\s*$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One figure that a measurement must reach."""

    id: str
    measurement: str
    """The module of bench/ that measures it."""
    what: str
    bound: Literal["at least", "at most"]
    limit: float
    unit: str

    def is_met(self, value: float) -> bool:
        """Whether `value` reaches the limit; a figure that is not a number reaches nothing."""
        return value >= self.limit if self.bound == "at least" else value <= self.limit

    def wanted(self) -> str:
        return f"{'≥' if self.bound == 'at least' else '≤'} {self.limit:g} {self.unit}".rstrip()


def _ratio(identity: str, measurement: str, what: str, limit: float) -> Goal:
    return Goal(id=identity, measurement=measurement, what=what, bound="at least", limit=limit, unit="")


def _most(identity: str, measurement: str, what: str, limit: float, unit: str) -> Goal:
    return Goal(id=identity, measurement=measurement, what=what, bound="at most", limit=limit, unit=unit)


GOALS: tuple[Goal, ...] = (
    _ratio("labeling-small-32px", "labeling", "labeling end to end ÷ CPU ceiling, small-32px", 0.8),
    _ratio("labeling-photos-224", "labeling", "labeling end to end ÷ CPU ceiling, EfficientNet-B0 at 224 px", 0.8),
    _ratio("training-small-32px", "training", "training ÷ CPU ceiling, small-32px", 0.8),
    _ratio("training-photos-224", "training", "training ÷ CPU ceiling, EfficientNet-B0 at 224 px", 0.8),
    Goal(
        id="corruptions-small",
        measurement="corruptions",
        what="the 15 corruptions at 32 px, images a second of one core",
        bound="at least",
        limit=5000,
        unit="images/s",
    ),
    _most("selection-memory", "selection", "peak memory of selecting from 10 M rows", 500, "MB"),
    _ratio("predict-throughput", "predict", "/predict at concurrency 8 ÷ in-process loop, EfficientNet-B0", 0.85),
    _most("api-memory", "startup", "resident memory of an API without a model", 150, "MB"),
    _most("api-torch-modules", "startup", "modules of torch, timm or torchvision in the API process", 0, ""),
    _most("server-import", "startup", "import of server.app", 2, "s"),
    _most("readyz", "startup", "/readyz answers 200 after the start of the process", 3, "s"),
    _most("supervisor-memory", "startup", "resident memory of the supervisor", 120, "MB"),
    _most("job-start-embedded", "job_start", "accepted → started, 95th percentile, embedded", 2.5, "s"),
    _most("job-start-redis", "job_start", "accepted → started, 95th percentile, with Redis", 0.5, "s"),
    _most("promotions-failed", "promotions", "requests that fail while an alias moves every 2 s", 0, ""),
    _most("promotions-wrong", "promotions", "answers with values of another generation than they name", 0, ""),
    _most("promotions-lag", "promotions", "old generation after the answer to PUT, on any replica", 5, "s"),
    _most("overload-failed", "promotions", "five-fold overload: neither answered rightly nor 503", 0, ""),
    _most("overload-late", "promotions", "five-fold overload: accepted images that waited longer than the deadline", 0, ""),
    _most("overload-memory", "promotions", "five-fold overload: growth of a replica's memory", 100, "MB"),
    _most("scale-reads-p99", "scale", "10⁶ jobs, 10⁵ generations, 30 000 shards: slowest API read, 99th percentile", 50, "ms"),
    _most("scale-controller-pass", "scale", "10⁶ jobs, 10⁵ generations, 30 000 shards: longest controller pass", 1, "s"),
    _most("streams-gaps", "streams", "500 event streams on one API: gaps, and streams that did not come to their end", 0, ""),
    _most("streams-doubles", "streams", "500 event streams on one API: events that came twice", 0, ""),
    _most("streams-memory", "streams", "500 event streams, events written for a minute: growth of the API's memory", 100, "MB"),
    _most("streams-read-beside", "streams", "/readyz and a read beside 500 streams while events are written, 99th percentile", 250, "ms"),
    _ratio("slots-busy", "slots", "a labeling job on three one-slot workers: slots busy ÷ slots × span", 0.9),
    _most("claims-double-postgresql", "claims", "16 claimers on PostgreSQL, 5 000 jobs: double claims", 0, ""),
    _most("claims-double-sqlite", "claims", "8 claimers on SQLite, 5 000 jobs: double claims", 0, ""),
    _most("labeling-shards", "shards", "peak memory of labeling, 32 shards ÷ 4 shards", 1.1, ""),
    _most("selection-shards", "shards", "peak memory of selecting from 1 M rows, 1 000 shards ÷ 10 shards", 1.25, ""),
    _most("supervisor-lists", "shards", "peak memory of a supervisor that lists 30 000 shards", 120, "MB"),
    _most("ingestion-memory", "ingestion", "peak memory of ingesting 10 M images", 1000, "MB"),
    _most("manifest-paging", "ingestion", "page of a manifest of 10 M images: last ÷ first, median", 1.5, ""),
    _most("simulate-controller-pass", "simulate", "longest controller pass, 30 000 shards and 200 simulated workers", 1, "s"),
    _most("simulate-reads-p99", "simulate", "99th percentile of the slowest API read meanwhile", 50, "ms"),
    _most("simulate-growth", "simulate", "a turn, claim, report or end late among 30 000 shards ÷ late among 3 000", 1.5, ""),
)

BY_HAND: tuple[str, ...] = ("promotions", "scale", "streams", "slots", "claims", "shards", "ingestion", "simulate")
"""Measurements that take minutes by design: they run when they are named."""
MEASUREMENTS: tuple[str, ...] = tuple(dict.fromkeys(goal.measurement for goal in GOALS if goal.measurement not in BY_HAND))
"""Every other measurement, in the order in which they run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A goal, its figure (None: it was not measured), and whether shortfalls.md explains a miss."""

    goal: Goal
    value: float | None
    explained: bool

    @property
    def met(self) -> bool:
        return self.value is not None and self.goal.is_met(self.value)

    @property
    def word(self) -> str:
        if self.met:
            return "met"
        if self.value is None:
            return "NOT MEASURED"
        return "missed, explained" if self.explained else "MISSED"

    @property
    def passes(self) -> bool:
        """A breakdown excuses a miss, never a figure that nobody measured."""
        return self.met or (self.value is not None and self.explained)


def judge(figures: Mapping[str, float], measurements: Iterable[str], shortfalls: str) -> list[Verdict]:
    """The verdict on every goal of these measurements; `figures` by goal id, `shortfalls` is the text of shortfalls.md."""
    names = set(measurements)
    explained = explained_goals(shortfalls)
    return [Verdict(goal=goal, value=figures.get(goal.id), explained=goal.id in explained) for goal in GOALS if goal.measurement in names]


def explained_goals(shortfalls: str) -> set[str]:
    """Ids of the goals that have a section: a heading with the id in backticks, and below it a table with at least two rows of numbers."""
    rows: dict[str, int] = {}
    current: list[str] = []
    for line in shortfalls.splitlines():
        heading = _HEADING.match(line)
        if heading:
            current = re.findall(r"`([a-z0-9-]+)`", heading.group(1))
        elif _TABLE_ROW.match(line):
            for identity in current:
                rows[identity] = rows.get(identity, 0) + 1
    return {identity for identity, count in rows.items() if count >= 2}
