"""How a child's errors reach the job's row."""

from __future__ import annotations

import errno
import io
import json
import math

import pytest

import workers.slots
from core.db.tables import Job
from core.lifecycle import ERROR_CLASSES
from ml import errors
from workers.attempt import FAILURES, Speaker, describe_failure
from workers.progress import MOST_WAITING, Reports
from workers.slots import Watch


def every_error(cls: type[errors.MlError] = errors.MlError) -> list[type[errors.MlError]]:
    return [cls, *(found for below in cls.__subclasses__() for found in every_error(below))]


# A private subclass is a detail of its module; outside it is what its parent is.
@pytest.mark.parametrize("cls", [cls for cls in every_error() if cls is not errors.Interrupted and not cls.__name__.startswith("_")])
def test_every_error_of_ml_has_a_class_and_a_code_of_its_own(cls: type[errors.MlError]) -> None:
    error = cls("message", status="empty") if cls is errors.BadImage else cls("message")

    described = describe_failure(error)

    assert described["class"] in ERROR_CLASSES
    assert [described["class"], described["code"]] == list(FAILURES[cls])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.Diverged("nan", step=7, loss="nan"), ("permanent", "training.diverged", 7)),
        (errors.OutOfMemory("big"), ("resource", "memory.exhausted", None)),
        (MemoryError(), ("resource", "memory.exhausted", None)),
        (errors.DiskFull("full"), ("retryable", "storage.full", None)),
        (OSError(errno.ENOSPC, "full"), ("retryable", "storage.full", None)),
        (OSError(errno.EIO, "bad disk"), ("retryable", "storage.unavailable", None)),
        (BlockingIOError(errno.EAGAIN, "no more processes"), ("retryable", "host.busy", None)),
        (FileNotFoundError(errno.ENOENT, "gone"), ("permanent", "attempt.crashed", None)),
        (ZeroDivisionError("x"), ("permanent", "attempt.crashed", None)),
    ],
)
def test_an_error_decides_about_retries_by_its_kind(error: BaseException, expected: tuple[str, str, int | None]) -> None:
    described = describe_failure(error)

    assert (described["class"], described["code"], described.get("step")) == expected


def test_what_no_database_takes_is_left_out_of_a_line() -> None:
    stream = io.StringIO()

    Speaker(stream).say({"type": "event", "data": {"loss": math.nan, "all": [1.0, math.inf], "key": "a\0b\udc80", "\\u0000": "ö"}})

    assert json.loads(stream.getvalue()) == {"type": "event", "data": {"loss": None, "all": [1.0, None], "key": "ab?", "\\u0000": "ö"}}


def test_progress_is_kept_once_and_told_seldom() -> None:
    reports = Reports()
    reports.take({"type": "event", "kind": "stage", "data": {"stage": "training"}})

    for done in range(100):
        reports.take({"type": "event", "kind": "progress", "data": {"done": done, "total": 1000}})

    assert reports.progress == {"stage": "training", "done": 99, "total": 1000}
    assert [kind for kind, _ in reports.items] == ["stage", "progress"]
    assert reports.phase == "training"


def test_an_attempt_that_is_lost_names_the_step_where_it_was_heard_last() -> None:
    reports = Reports()
    reports.take({"type": "event", "kind": "progress", "data": {"done": 7, "total": 9, "unit": "steps"}})
    reports.written()
    assert reports.step == 7

    reports.take({"type": "event", "kind": "progress", "data": {"done": 64, "total": 640, "unit": "images"}})

    assert reports.step is None


def test_a_process_that_the_kernel_killed_for_memory_ran_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 3
    monkeypatch.setattr(workers.slots, "count_oom_kills", lambda: kills)
    training, ingesting = (Watch(job=Job(kind=kind), child=None) for kind in ("train", "ingest"))  # type: ignore[arg-type]
    assert training.describe_death("was killed by SIGKILL")["code"] == "attempt.lost"

    kills += 1

    assert training.describe_death("ended with status 1")["code"] == "attempt.lost"
    assert ingesting.describe_death("was killed by SIGKILL")["code"] == "attempt.lost"
    died = training.describe_death("was killed by SIGKILL")
    assert (died["class"], died["code"]) == ("resource", "memory.exhausted")


def test_a_database_that_is_away_for_long_costs_points_but_no_memory() -> None:
    reports = Reports()

    for step in range(3 * MOST_WAITING):
        reports.take({"type": "event", "kind": "metric", "data": {"step": step}})
    reports.take({"type": "event", "kind": "checkpoint", "data": {"step": 1}})

    assert len(reports.items) <= MOST_WAITING + 1
    assert reports.items[-1][0] == "checkpoint"
