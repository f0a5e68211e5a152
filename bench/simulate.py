"""A pool of 300 M images as 30 000 shards, and 200 simulated workers that are slow, die and repeat themselves.

By hand: `make simulate`. Controller, relay, sweep, claims, reports, API, PostgreSQL and Redis are the service's own; only what a network
would compute is pretended. SEED, SHARDS, WORKERS and WORK_SECONDS (of a usual shard) choose. A tenth of the shards is simulated first:
growth is seen between the two.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from bench.measurement import Measurement, busy_elsewhere
from bench.simulation.oracle import NEVER, find_faults
from bench.simulation.plan import WORK_SECONDS, Notes, Plan
from bench.simulation.plots import draw
from bench.simulation.readers import Reader
from bench.simulation.scene import Scene, setting, working
from bench.simulation.story import WORK, Story, describe_reads, describe_work, growth, high
from ml.cores import num_cores

COUNTS = ("dies", "freezes", "slow", "repeats", "late results fenced", "repeated results fenced", *NEVER, "messages that came twice")
_SAMPLE_SECONDS = 0.5
_PICTURES = Path(__file__).parents[1] / "docs" / "experiments"


def measure() -> Measurement:
    """The tenth first, then all; RuntimeError when anything was lost, doubled or broken."""
    seed, shards, workers = (int(os.environ.get(name) or usual) for name, usual in (("SEED", 0), ("SHARDS", 30_000), ("WORKERS", 200)))
    work = float(os.environ.get("WORK_SECONDS") or WORK_SECONDS)
    found = Measurement(name="simulate", details={"seed": seed, "shards": shards, "workers": workers, "work_seconds": work})
    stories = []
    for number in (max(1, shards // 10), shards):
        story = simulate(Plan(seed=seed, shards=number, workers=workers, work_seconds=work))
        stories.append(story)
        print(f"{number} shards: {story.labeling()[1] - story.labeling()[0]:.0f} s, faults: {story.faults or 'none'}", flush=True)
        if story.faults:
            raise RuntimeError(f"{len(story.faults)} things are not as they must be, such as: " + "\n".join(story.faults[:20]))
    _judge(found, *stories)
    found.details["plots"] = [path.name for path in draw(stories, _PICTURES)]
    return found


def simulate(plan: Plan) -> Story:
    """One run from its first job to its last, and what is wrong with it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-simulate-"))
    try:
        with setting(plan, directory) as scene:
            notes, reader = Notes(), Reader(scene)
            before = busy_elsewhere()
            reader.start()
            try:
                with working(scene, notes):
                    progress, calm = _watch(scene)
            finally:
                reader.stop.set()
                reader.join()
            after = busy_elsewhere()
            notes.errors += reader.notes.errors
            story = Story(plan, notes, reader.notes, progress, calm, (after[1] - before[1]) / (after[0] - before[0]) / num_cores())
            story.faults = find_faults(scene, notes)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return story


def _watch(scene: Scene) -> tuple[list[tuple[float, int]], tuple[float, float]]:
    """Note the progress until the run has ended; let the workers pause at half of it. Returns it, and when they paused."""
    plan, shared = scene.shared.plan, scene.shared
    progress: list[tuple[float, int]] = []
    calm = (0.0, 0.0)
    end = time.monotonic() + plan.limit_seconds
    # Usual attempts that were begun have ended after one and a half times their length; then it is quiet but for the slow.
    settles = 1.5 * plan.work_seconds + 1.0
    while (status := scene.run_status()) == "active":
        if time.monotonic() > end:
            raise TimeoutError(f"the run did not end within {plan.limit_seconds} s: {shared.done.value} of {plan.shards} shards are done")
        progress.append((time.time(), shared.done.value))
        if not calm[0] and shared.done.value >= plan.shards / 2 and plan.calm_seconds:
            shared.pause.set()
            calm = (time.time() + settles, time.time() + settles + plan.calm_seconds)
        elif shared.pause.is_set() and time.time() > calm[1]:
            shared.pause.clear()
        time.sleep(_SAMPLE_SECONDS)
    progress.append((time.time(), shared.done.value))
    if status != "completed":
        raise RuntimeError(f"the run ended as {status}: {scene.database.url}")
    return progress, calm


def _judge(found: Measurement, small: Story, large: Story) -> None:
    grown = growth(small, large)
    found.figures = {
        "simulate-controller-pass": max(seconds for _, seconds in large.controller()),
        "simulate-reads-p99": 1000 * max(high(values) for values in large.reads_by_path(calm=False).values()),
        "simulate-growth": max((grown[name] for name in ("whole turn", *WORK) if name in grown), default=math.nan),
    }
    for story in (small, large):
        begun, ended = story.labeling()
        found.tables[f"{story.plan.shards} shards: times"] = describe_work(story)
        found.tables[f"{story.plan.shards} shards: reads"] = describe_reads(story)
        counts = {name: story.notes.counts[name] for name in COUNTS}
        calm = story.calm[1] - story.calm[0]
        rates = {
            "labeled in, s": ended - begun,
            "shards a second": story.plan.shards / (ended - begun - calm),
            "share of others": story.others,
        }
        found.tables[f"{story.plan.shards} shards: what happened"] = [
            {"what": name, "number": value} for name, value in (rates | counts).items()
        ]
    found.tables["Median in the last tenth of the large run ÷ in the last tenth of the small one"] = [
        {"what": name, "ratio": ratio} for name, ratio in grown.items()
    ]
    found.details["counts"] = {str(story.plan.shards): dict(story.notes.counts) for story in (small, large)}
