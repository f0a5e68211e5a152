"""What a run's events add up to: stages, shares, rates, loss and accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cli.client import StreamEvent
from cli.progress import RunProgress

JOBS = [
    {"id": "teacher", "iteration": 0, "step": "train-teacher"},
    {"id": "shard-0", "iteration": 1, "step": "label"},
    {"id": "shard-1", "iteration": 1, "step": "label"},
]


class Asked:
    """The run's jobs, newest first as the API lists them, how often somebody asked for them and how many of them they read."""

    def __init__(self) -> None:
        self.jobs = JOBS[::-1]
        self.times = self.read = 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.times += 1
        for job in self.jobs:
            self.read += 1
            yield job


def event(job_id: str, kind: str, **data: Any) -> StreamEvent:
    return StreamEvent(1, kind, {"job_id": job_id, "data": data})


def progress_of(*events: StreamEvent) -> RunProgress:
    progress = RunProgress(Asked())
    for one in events:
        progress.apply(one)
    return progress


def test_only_jobs_that_are_new_are_read_when_an_unknown_one_reports() -> None:
    asked = Asked()
    progress = RunProgress(asked)
    progress.apply(event("shard-1", "queued"))
    asked.jobs.insert(0, {"id": "select", "iteration": 1, "step": "select"})
    asked.read = 0

    stage = progress.apply(event("select", "queued"))

    assert stage is not None
    assert stage.title == progress.stages[1, "select"].title
    # The new one, and the first that was known before.
    assert asked.read == 2


def test_a_job_that_a_clock_behind_made_is_found_among_the_known_ones() -> None:
    asked = Asked()
    progress = RunProgress(asked)
    progress.apply(event("shard-1", "queued"))
    asked.jobs.insert(2, {"id": "select", "iteration": 1, "step": "select"})

    stage = progress.apply(event("select", "queued"))

    assert stage is progress.stages[1, "select"]


def test_a_training_tells_rate_time_left_loss_and_accuracy() -> None:
    progress = progress_of(
        event("teacher", "queued"),
        event("teacher", "started"),
        event("teacher", "metric", step=50, loss=0.25),
        event("teacher", "metric", step=50, validation_top1=0.9),
        event("teacher", "progress", done=50, total=100, unit="steps", images_per_second=400.0, eta_seconds=62.0),
    )

    [stage] = progress.stages.values()
    assert (stage.status, stage.share) == ("running", 0.5)
    assert stage.describe() == "400 images/s, 1 min 02 s left, loss 0.250, validation 90.0 %"


def test_shards_are_one_stage_whose_rates_add_up() -> None:
    progress = progress_of(
        event("shard-0", "queued"),
        event("shard-1", "queued"),
        event("shard-0", "started"),
        event("shard-1", "started"),
        event("shard-0", "progress", done=50, total=100, unit="images", images_per_second=10.0),
        event("shard-1", "progress", done=25, total=100, unit="images", images_per_second=20.0),
        event("shard-0", "succeeded"),
    )

    [stage] = progress.stages.values()
    assert (stage.title, stage.status, stage.share) == ("iteration 1 · labeling", "running", 0.625)
    assert stage.describe() == "1/2 shards, 20 images/s, 4 s left"


def test_a_lost_attempt_is_noted_and_the_stage_waits_again() -> None:
    progress = progress_of(
        event("teacher", "queued"), event("teacher", "started"), event("teacher", "retrying", error={"message": "worker stopped answering"})
    )

    [stage] = progress.stages.values()
    assert stage.status == "queued"
    assert progress.notes == ["generation 0 · training the teacher: retrying, worker stopped answering"]


def test_a_failed_job_fails_its_stage_and_says_why() -> None:
    progress = progress_of(event("teacher", "started"), event("teacher", "failed", error={"message": "the loss of step 3 is nan"}))

    [stage] = progress.stages.values()
    assert stage.status == "failed"
    assert "the loss of step 3 is nan" in progress.notes[0]


def test_jobs_are_asked_for_once_and_not_with_each_event() -> None:
    asked = Asked()
    progress = RunProgress(asked)

    for one in (event("teacher", "queued"), event("teacher", "started"), event("shard-0", "queued")):
        progress.apply(one)

    assert asked.times == 1


def test_the_streams_own_end_belongs_to_no_stage() -> None:
    assert progress_of().apply(StreamEvent(None, "end", {"status": "completed"})) is None
