"""Which fault comes when: rounds in which every kind comes once, in an order that the seed draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.faults import faults_buckets, faults_moves, faults_processes, faults_servers, faults_serving, faults_storage
from tests.faults.fault import Fault
from tests.faults.stage import chance

KINDS: tuple[type[Fault], ...] = (
    *faults_processes.KINDS,
    *faults_servers.KINDS,
    *faults_storage.KINDS,
    *faults_buckets.KINDS,
    *faults_serving.KINDS,
    *faults_moves.KINDS,
)


def kinds_of(database: str, storage: str, *, trains: bool) -> list[type[Fault]]:
    """Those that can happen there."""
    there = [kind for kind in KINDS if database in kind.databases and storage in kind.storages]
    return [kind for kind in there if trains or not kind.needs_training]


def draw_plan(kinds: Sequence[type[Fault]], seed: int, database: str) -> Iterator[type[Fault]]:
    """Without an end. After n rounds every kind has had its turn n times."""
    generator = chance(seed, database, "plan")
    while True:
        turn = list(kinds)
        generator.shuffle(turn)
        yield from turn
