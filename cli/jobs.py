"""`noisy-student jobs`: what runs, what waits and why, what failed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.client import API
from cli.invocation import get_invocation

app = typer.Typer(no_args_is_help=True, help="Jobs: list, show, cancel, retry, logs.")
JobId = Annotated[str, typer.Argument(help="Its id.")]


@app.command("list")
def list_jobs(
    context: typer.Context,
    *,
    run: Annotated[str | None, typer.Option(help="Only this run's.")] = None,
    status: Annotated[str | None, typer.Option(help="Only queued, running, succeeded, failed or canceled ones.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only ingest, split, train, label, select, predict or import ones.")] = None,
    most: Annotated[int, typer.Option("--limit", help="How many.", min=1)] = 50,
) -> None:
    """List jobs, newest first."""
    invocation = get_invocation(context)
    jobs = list(invocation.client.pages(f"{API}/jobs", run_id=run, status=status, kind=kind, most=most))
    columns = {"job": "id", "kind": "kind", "step": "step", "iteration": "iteration", "status": "status", "attempt": "attempt"}
    invocation.output.table(jobs, columns | {"waits for": "waiting_for", "created": "created_at"})


@app.command("show")
def show(context: typer.Context, *, job: JobId) -> None:
    """Show a job with its progress, result or error."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/jobs/{job}")
    lines = [
        f"{name}: {json.dumps(value) if isinstance(value, dict) else value}" for name, value in found.items() if value not in (None, {})
    ]
    invocation.output.result(found, "\n".join(lines))


@app.command("cancel")
def cancel(context: typer.Context, *, job: JobId) -> None:
    """Stop a job; a running one writes its checkpoint first."""
    invocation = get_invocation(context)
    found = invocation.client.post(f"{API}/jobs/{job}/cancel")
    text = f"job {job} is canceled" if found["status"] == "canceled" else f"job {job} stops as soon as its checkpoint is written"
    invocation.output.result(found, text)


@app.command("retry")
def retry(context: typer.Context, *, job: JobId) -> None:
    """Queue a failed or canceled job again; it goes on from its last checkpoint."""
    invocation = get_invocation(context)
    invocation.output.result(invocation.client.post(f"{API}/jobs/{job}/retry"), f"job {job} is queued again")


@app.command("logs")
def logs(
    context: typer.Context, job: JobId, attempt: Annotated[int | None, typer.Option(help="Which one [default: the newest].", min=1)] = None
) -> None:
    """Print what a job's process wrote to its standard error."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/jobs/{job}/logs", attempt=attempt)
    invocation.output.result(found, found["text"].rstrip("\n"))
