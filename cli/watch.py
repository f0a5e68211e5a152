"""`noisy-student watch`: a run as it goes, one live bar per stage, from its event stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.client import API, Client, StreamEvent
from cli.invocation import Invocation, get_invocation
from cli.lineage import print_lineage
from cli.output import Output
from cli.progress import RunProgress, Stage

if TYPE_CHECKING:
    from rich.table import Table

REPORT_EVERY_SHARE = 0.25
OnStage = Callable[[Stage | None], None]


def watch(
    context: typer.Context,
    *,
    run: Annotated[str | None, typer.Argument(help="Id of a run [default: the newest].")] = None,
    after: Annotated[int, typer.Option(help="Only events above this number (with --json).", min=0)] = 0,
) -> int:
    """Follow a run: bars, rates, time left, loss and accuracy. With --json every event as a line. Ctrl-C stops watching, not the run."""
    invocation = get_invocation(context)
    run_id = run or newest_run(invocation.client)
    try:
        if invocation.output.as_json:
            return _print_events(invocation, run_id, after)
        return watch_run(invocation, run_id)
    except KeyboardInterrupt:
        invocation.output.say(f"\nno longer watching; the run goes on: noisy-student watch {run_id}")
        return 0


def newest_run(client: Client) -> str:
    """The id of the run that was started last."""
    for found in client.pages(f"{API}/runs", most=1):
        return str(found["id"])
    raise typer.BadParameter("there is no run yet; start one with `noisy-student runs start`")


def _print_events(invocation: Invocation, run_id: str, after: int) -> int:
    for event in invocation.client.follow(f"{API}/runs/{run_id}/events", after=after):
        invocation.output.line({"number": event.number, "kind": event.kind, **{k: v for k, v in event.data.items() if k != "number"}})
    return 0 if invocation.client.get(f"{API}/runs/{run_id}")["status"] == "completed" else 1


def watch_run(invocation: Invocation, run_id: str, *, until: Callable[[dict[str, Any]], bool] | None = None) -> int:
    """Show progress until the run ends (or `until`, asked with the run after every ended job); 0 when it completed."""
    client = invocation.client
    progress = RunProgress(lambda: client.pages(f"{API}/jobs", run_id=run_id))
    with _shown(invocation.output, progress) as on_stage:
        for event in client.follow(f"{API}/runs/{run_id}/events"):
            on_stage(progress.apply(event))
            if until is not None and event.kind in ("succeeded", "failed", "canceled") and until(client.get(f"{API}/runs/{run_id}")):
                break
    found = client.get(f"{API}/runs/{run_id}")
    return report_run(invocation, found)


def report_run(invocation: Invocation, run: dict[str, Any]) -> int:
    """The run's end in words, with its lineage; 0 unless it failed or was canceled."""
    output = invocation.output
    print_lineage(invocation, run["id"])
    reason = f" ({run['stop_reason']})" if run.get("stop_reason") else ""
    output.say(f"run {run['id']} is {run['status']}{reason}")
    if run.get("error"):
        output.error(str(run["error"].get("message", run["error"])), {"run": run["id"], **run["error"]})
    return 1 if run["status"] in ("failed", "canceled") else 0


@contextmanager
def _shown(output: Output, progress: RunProgress) -> Iterator[OnStage]:
    """Live bars at a terminal, a line now and then where there is none."""
    if not output.console.is_terminal:
        yield _Lines(output, progress)
        return
    from rich.live import Live

    with Live(_draw(progress), console=output.console, refresh_per_second=4) as live:

        def on_stage(_stage: Stage | None) -> None:
            live.update(_draw(progress))

        yield on_stage


def _draw(progress: RunProgress) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    marks = {"queued": "·", "running": "▶", "succeeded": "✓", "failed": "✗", "canceled": "–"}
    table = Table.grid(padding=(0, 1))
    for stage in progress.stages.values():
        bar = ProgressBar(total=1.0, completed=1.0 if stage.status == "succeeded" else stage.share, width=30)
        table.add_row(Text(marks[stage.status]), Text(stage.title), bar, Text(f"{100 * stage.share:3.0f} %"), Text(stage.describe()))
    for note in progress.notes[-5:]:
        table.add_row(Text("!"), Text(note, overflow="fold"))
    return table


class _Lines:
    """For logs and pipes: a line when a stage starts, at each quarter, and when it ends."""

    def __init__(self, output: Output, progress: RunProgress) -> None:
        self._output = output
        self._progress = progress
        self._said: dict[tuple[int, str], tuple[str, int]] = {}
        self._notes = 0

    def __call__(self, stage: Stage | None) -> None:
        for note in self._progress.notes[self._notes :]:
            self._output.say(f"! {note}")
        self._notes = len(self._progress.notes)
        if stage is None or stage.status == "queued":
            return
        mark = (stage.status, int(stage.share / REPORT_EVERY_SHARE))
        if self._said.get((stage.iteration, stage.step)) == mark:
            return
        self._said[stage.iteration, stage.step] = mark
        numbers = stage.describe()
        self._output.say(
            f"{stage.title}: {stage.status if stage.status != 'running' else f'{100 * stage.share:.0f} %'}"
            f"{f' ({numbers})' if numbers else ''}"
        )


__all__ = ["StreamEvent", "newest_run", "report_run", "watch", "watch_run"]
