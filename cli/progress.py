"""A run's progress as its events tell it, and bars for people. What is counted here draws nothing; `cli.watch` draws it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cli.client import StreamEvent
from cli.output import Output, show_duration

JobReader = Callable[[str], dict[str, Any]]
TITLES = {
    "train-teacher": "training the teacher",
    "label": "labeling",
    "select": "selecting",
    "train-student": "training the student",
    "train-control": "training the control",
}
SILENCE_SECONDS = 5.0
ENDED = ("succeeded", "failed", "canceled")


@dataclass
class Part:
    """One job of a stage, as its events describe it."""

    status: str = "queued"
    stage: str | None = None
    done: float = 0.0
    total: float = 0.0
    rate: float | None = None
    eta_seconds: float | None = None


@dataclass
class Stage:
    """All jobs of one step of one iteration: one bar."""

    iteration: int
    step: str
    parts: dict[str, Part] = field(default_factory=dict)
    loss: float | None = None
    accuracy: float | None = None
    best: float = 0.0
    unit: str = ""

    @property
    def title(self) -> str:
        """`iteration 1 · labeling`."""
        return f"{'generation 0' if self.iteration == 0 else f'iteration {self.iteration}'} · {TITLES.get(self.step, self.step)}"

    @property
    def status(self) -> str:
        """Failed or canceled when one part is; running when one was started; succeeded when all are."""
        found = {part.status for part in self.parts.values()}
        for status in ("failed", "canceled"):
            if status in found:
                return status
        if found <= {"succeeded"}:
            return "succeeded"
        return "queued" if found == {"queued"} else "running"

    @property
    def share(self) -> float:
        """How much is done, in [0, 1]: the mean over the parts, a finished one counting 1."""
        shares = [1.0 if part.status == "succeeded" else (part.done / part.total if part.total else 0.0) for part in self.parts.values()]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def rate(self) -> float | None:
        """Images a second of all running parts together."""
        rates = [part.rate for part in self.parts.values() if part.status == "running" and part.rate is not None]
        return sum(rates) if rates else None

    @property
    def eta_seconds(self) -> float | None:
        """When the running parts are done; None when that is not known."""
        running = [part for part in self.parts.values() if part.status == "running"]
        known = [part.eta_seconds for part in running if part.eta_seconds is not None]
        return max(known) if known else None

    def describe(self) -> str:
        """The numbers behind the bar."""
        words = []
        doing = {
            part.stage for part in self.parts.values() if part.status == "running" and part.stage not in (None, "training", "labeling")
        }
        if doing:
            words.append(", ".join(sorted(stage for stage in doing if stage)))
        if len(self.parts) > 1:
            words.append(f"{sum(part.status == 'succeeded' for part in self.parts.values())}/{len(self.parts)} shards")
        if self.status == "running" and self.rate:
            words.append(f"{self.rate:.0f} images/s")
        if self.status == "running" and self.eta_seconds is not None:
            words.append(f"{show_duration(self.eta_seconds)} left")
        if self.loss is not None:
            words.append(f"loss {self.loss:.3f}")
        if self.accuracy is not None:
            # What is kept is the best by validation, not the last.
            words.append(
                f"validation {100 * self.accuracy:.1f} %" + (f", best {100 * self.best:.1f} %" if self.best > self.accuracy else "")
            )
        return ", ".join(words)


class RunProgress:
    """Stages of a run in the order in which they appeared, moved on by its events."""

    def __init__(self, read_jobs: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self._read_jobs = read_jobs
        self._places: dict[str, tuple[int, str] | None] = {}
        self.stages: dict[tuple[int, str], Stage] = {}
        self.notes: list[str] = []

    def apply(self, event: StreamEvent) -> Stage | None:
        """Take one event in; returns the stage it belongs to."""
        envelope = event.data
        job_id = envelope.get("job_id")
        if job_id is None:
            return None
        stage = self._stage_of(job_id)
        if stage is None:
            return None
        part = stage.parts.setdefault(job_id, Part())
        self._move(stage, part, event.kind, envelope.get("data") or {})
        return stage

    def _stage_of(self, job_id: str) -> Stage | None:
        if job_id not in self._places:
            # Events do not repeat their job's place; a step's jobs are made together, or a thousand at a time.
            self._read_places(until_known=True)
        if job_id not in self._places:
            self._read_places(until_known=False)
            self._places.setdefault(job_id, None)
        place = self._places[job_id]
        return None if place is None else self.stages.setdefault(place, Stage(*place))

    def _read_places(self, *, until_known: bool) -> None:
        """Newest first: before a job that is known there are only known ones, but for what a host with another clock made."""
        for job in self._read_jobs():
            if until_known and job["id"] in self._places:
                return
            self._places[job["id"]] = None if job["step"] is None else (job["iteration"], job["step"])

    def _move(self, stage: Stage, part: Part, kind: str, data: dict[str, Any]) -> None:
        if kind in ("queued", "retrying", "interrupted"):
            part.status = "queued"
            if kind != "queued":
                reason = data.get("reason") or (data.get("error") or {}).get("message")
                self.notes.append(f"{stage.title}: {kind}{f', {reason}' if reason else ''}")
        elif kind == "started":
            part.status, part.rate, part.eta_seconds = "running", None, None
        elif kind in ENDED:
            part.status = kind
            if kind == "failed":
                self.notes.append(f"{stage.title}: failed, {(data.get('error') or {}).get('message', 'no reason was recorded')}")
        elif kind == "stage":
            part.stage = data.get("stage")
        elif kind == "warning":
            self.notes.append(f"{stage.title}: {data.get('message')}")
        elif kind in ("progress", "metric"):
            _measure(stage, part, data)


def _measure(stage: Stage, part: Part, data: dict[str, Any]) -> None:
    if data.get("total"):
        part.done, part.total = float(data.get("done", 0)), float(data["total"])
        stage.unit = str(data.get("unit", stage.unit))
        part.rate = data.get("images_per_second", part.rate)
        part.eta_seconds = data.get("eta_seconds")
        if part.eta_seconds is None and part.rate and stage.unit in ("images", "files"):
            part.eta_seconds = (part.total - part.done) / part.rate
    if data.get("loss") is not None:
        stage.loss = float(data["loss"])
    if data.get("validation_top1") is not None:
        stage.accuracy = float(data["validation_top1"])
        stage.best = max(stage.best, stage.accuracy)


class _WaitingLines:
    """Says why a job waits, once it has waited for SILENCE_SECONDS, and again when the reason is another."""

    def __init__(self, output: Output, doing: str) -> None:
        self._output, self._doing = output, doing
        self._speak_at, self._told = time.monotonic() + SILENCE_SECONDS, ""

    def on_change(self, job: dict[str, Any]) -> None:
        reason = (job.get("waiting_for") or "") if job["status"] == "queued" else ""
        # Seconds that are left and jobs that come before it change all the time.
        kind = re.sub(r"\d+", "", reason)
        if reason and kind != self._told and time.monotonic() >= self._speak_at:
            self._told = kind
            self._output.say(f"{self._doing}: job {job['id']} {_describe_state(job)}")


def _describe_state(job: dict[str, Any]) -> str:
    reason = job.get("waiting_for") if job["status"] == "queued" else None
    return f"waits: {reason}" if reason else str(job["status"])


@contextmanager
def show_job_progress(output: Output, doing: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar for one job, for people at a terminal; yields what to call with the job whenever it was read.

    Elsewhere, as in a log, a line says why the job waits, when it does so for a while.
    """
    if output.as_json:
        yield lambda _job: None
        return
    if not output.console.is_terminal:
        yield _WaitingLines(output, doing).on_change
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    with Progress(*columns, console=output.console, transient=True) as bars:
        task = bars.add_task(doing, total=None, state="")

        def on_change(job: dict[str, Any]) -> None:
            found = job.get("progress") or {}
            bars.update(task, completed=found.get("done", 0), total=found.get("total"), state=_describe_state(job))

        yield on_change
