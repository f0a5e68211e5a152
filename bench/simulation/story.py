"""What a simulation gave: every time against progress, the calm interval, and the figures that follow."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.simulation.plan import Notes, Plan

WORK = ("claim", "report", "end", "follow")
"""What workers ask of the database."""
PARTS = ("lose jobs", "move jobs", "hint again", "relay", "sweep")
"""Of housekeeping's turn; the rest of it is the controller's."""
FEWEST = 10
"""A median of fewer tells nothing of growth."""


@dataclass(slots=True)
class Story:
    """Of one run from its first job to its last."""

    plan: Plan
    notes: Notes
    reads: Notes
    progress: list[tuple[float, int]]
    """(when, shards labeled), twice a second."""
    calm: tuple[float, float]
    """When the workers paused."""
    others: float = 0.0
    """Share of the machine's cores that processes took which are not of the simulation."""
    faults: list[str] = field(default_factory=list)

    def share(self, at: Iterable[float]) -> Any:
        """Progress of the labeling at these moments, from 0 to 1."""
        moments, done = zip(*self.progress, strict=True)
        return np.interp(list(at), moments, done) / self.plan.shards

    def labeling(self) -> tuple[float, float]:
        """When the first shard was done, and the last."""
        begun = max((at for at, done in self.progress if done == 0), default=self.progress[0][0])
        return begun, min(at for at, done in self.progress if done >= self.plan.shards)

    def is_calm(self, at: float) -> bool:
        return self.calm[0] <= at < self.calm[1]

    def times(self, what: str) -> list[tuple[float, float]]:
        """(when, seconds) in order."""
        return sorted((at, seconds) for name, at, seconds in self.notes.times if name == what)

    def controller(self) -> list[tuple[float, float]]:
        """Of each turn, what is left when relay, sweep and the like are taken away."""
        parts = sorted((at, seconds) for name, at, seconds in self.notes.times if name in PARTS)
        found, place = [], 0
        for at, seconds in self.times("turn"):
            while place < len(parts) and parts[place][0] < at:
                place += 1
            within = 0.0
            while place < len(parts) and parts[place][0] < at + seconds:
                within += parts[place][1]
                place += 1
            found.append((at, max(0.0, seconds - within)))
        return found

    def during(self, times: Iterable[tuple[float, float]], low: float = 0.0, high: float = 1.0) -> list[float]:
        """The seconds of those that began between these shares of the labeling, the calm interval left out."""
        begun, ended = self.labeling()
        kept = [(at, seconds) for at, seconds in times if begun <= at <= ended and not self.is_calm(at)]
        shares = self.share(at for at, _ in kept) if kept else []
        return [seconds for (_, seconds), share in zip(kept, shares, strict=True) if low <= share <= high]

    def reads_by_path(self, *, calm: bool) -> dict[str, list[float]]:
        """While the shards are labeled; with the workers at work or at rest."""
        begun, ended = self.labeling()
        found: dict[str, list[float]] = defaultdict(list)
        for name, at, seconds in self.reads.times:
            if begun <= at <= ended and self.is_calm(at) == calm:
                found[name].append(seconds)
        return dict(found)


def high(values: Sequence[float], share: float = 0.99) -> float:
    """The value that this share of them does not exceed; NaN of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.nan


def middle(values: Sequence[float]) -> float:
    """The median; NaN of none."""
    return statistics.median(values) if values else math.nan


def describe_work(story: Story) -> list[dict[str, Any]]:
    """What each kind of write and turn took, at the beginning and at the end."""
    rows = []
    for name, times in _kinds(story).items():
        everything = [seconds for _, seconds in times]
        rows.append(
            {
                "what": name,
                "times": len(everything),
                "first tenth, ms": 1000 * middle(story.during(times, 0.0, 0.1)),
                "last tenth, ms": 1000 * middle(story.during(times, 0.9, 1.0)),
                "p99, ms": 1000 * high(everything),
                "longest, ms": 1000 * max(everything, default=math.nan),
            }
        )
    return rows


def describe_reads(story: Story) -> list[dict[str, Any]]:
    """Each read while the workers work, and while they pause."""
    busy, calm = story.reads_by_path(calm=False), story.reads_by_path(calm=True)
    return [
        {
            "read": name,
            "times": len(busy[name]),
            "median, ms": 1000 * middle(busy[name]),
            "p99, ms": 1000 * high(busy[name]),
            "paused: times": len(calm.get(name, ())),
            "paused: median, ms": 1000 * middle(calm.get(name, ())),
            "paused: p99, ms": 1000 * high(calm.get(name, ())),
        }
        for name in busy
    ]


def growth(small: Story, large: Story) -> dict[str, float]:
    """By kind of work: its median in the last tenth of the large run ÷ that in the last tenth of the small one.

    1: the whole grows as the shards do. Beginnings are left out: there the jobs are still being written down, in both.
    """
    found = {}
    of_both = [_kinds(story) for story in (small, large)]
    for name in of_both[0]:
        before, last = (story.during(kinds[name], 0.9, 1.0) for story, kinds in zip((small, large), of_both, strict=True))
        if min(len(last), len(before)) >= FEWEST:
            found[name] = middle(last) / middle(before)
    return found


def _kinds(story: Story) -> dict[str, list[tuple[float, float]]]:
    """(when, seconds) of everything that is timed, by its name."""
    times = {"controller in a turn": story.controller(), "whole turn": story.times("turn")}
    return times | {name: story.times(name) for name in (*PARTS, *WORK)}
