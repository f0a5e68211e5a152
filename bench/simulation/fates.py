"""What befalls an attempt, drawn by seed, step, part and attempt: whoever takes the job, so that every count is known beforehand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["steady", "slow", "dies", "freezes", "repeats"]

SHARES: dict[Kind, float] = {"slow": 0.01, "dies": 0.02, "freezes": 0.01, "repeats": 0.03}
"""Of all attempts; the rest are steady."""
DELIVERED_TWICE = 0.03
"""Share of the messages that come to two workers."""
SURE_ATTEMPT = 4
"""The last attempt that a job has by default is never lost: what is counted here are attempts, not failed runs."""


@dataclass(frozen=True, slots=True)
class Fate:
    """One attempt's."""

    kind: Kind
    work: float
    """Length of the pretended work, as a multiple of the usual one."""

    @property
    def is_lost(self) -> bool:
        """Whether the lease runs out."""
        return self.kind in ("dies", "freezes")


def fate_of(seed: int, step: str, part: int, attempt: int) -> Fate:
    """Of this attempt."""
    draw = random.Random(f"{seed} {step} {part} {attempt}")
    place, work = draw.random(), draw.uniform(0.5, 1.5)
    for kind, share in SHARES.items():
        if place < share:
            return Fate("steady" if attempt >= SURE_ATTEMPT and kind in ("dies", "freezes") else kind, work)
        place -= share
    return Fate("steady", work)


def is_delivered_twice(seed: int, job_id: str) -> bool:
    """Whether this job's message is."""
    return random.Random(f"{seed} {job_id}").random() < DELIVERED_TWICE


def fates_of(seed: int, step: str, part: int) -> list[Fate]:
    """Of every attempt that this job must have, the one that succeeds last."""
    fates = [fate_of(seed, step, part, 1)]
    while fates[-1].is_lost:
        fates.append(fate_of(seed, step, part, len(fates) + 1))
    return fates


def count_fates(seed: int, jobs: Iterable[tuple[str, int]]) -> Counter[str]:
    """How many attempts of each kind these (step, part) must have."""
    return Counter(fate.kind for step, part in jobs for fate in fates_of(seed, step, part))
