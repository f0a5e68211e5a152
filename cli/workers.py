"""`noisy-student workers`: who runs jobs, on what, and taking one out of service without interrupting anything."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.client import API
from cli.invocation import get_invocation

app = typer.Typer(no_args_is_help=True, help="Workers: list, drain, resume.")
WorkerId = Annotated[str, typer.Argument(help="Its id.")]


@app.command("list")
def list_workers(
    context: typer.Context, *, everyone: Annotated[bool, typer.Option("--all", help="Also those that are gone.")] = False
) -> None:
    """List the workers that are there, newest first."""
    invocation = get_invocation(context)
    found = [worker for worker in invocation.client.pages(f"{API}/workers", most=1000) if everyone or worker["alive"]]
    rows = [worker | _describe(worker) for worker in found]
    columns = {"worker": "id", "name": "name", "state": "state", "can": "capabilities", "slots": "slots", "device": "device"}
    columns |= {"version": "version", "code": "code", "jobs": "jobs", "seen": "seen_at"}
    invocation.output.table(found if invocation.output.as_json else rows, columns)


def _describe(worker: dict[str, Any]) -> dict[str, Any]:
    state = "works" if worker["draining_at"] is None else "drains"
    if not worker["alive"]:
        state = "silent" if worker["stopped_at"] is None else "stopped"
    devices = [device["name"] or device["kind"] for device in worker["facts"]["devices"]]
    return {"state": state, "device": devices or f"{worker['facts']['num_cores'] or '?'} cores", "code": (worker["code_digest"] or "")[:12]}


@app.command("drain")
def drain(context: typer.Context, *, worker: WorkerId) -> None:
    """Let a worker finish what it runs and take no more; then it can be stopped without interrupting anything."""
    invocation = get_invocation(context)
    found = invocation.client.post(f"{API}/workers/{worker}/drain")
    left = f"finishes {', '.join(found['jobs'])} and takes" if found["jobs"] else "runs nothing and takes"
    invocation.output.result(found, f"worker {worker} {left} no more jobs")


@app.command("resume")
def resume(context: typer.Context, *, worker: WorkerId) -> None:
    """Let a draining worker take jobs again."""
    invocation = get_invocation(context)
    invocation.output.result(invocation.client.post(f"{API}/workers/{worker}/resume"), f"worker {worker} takes jobs")
