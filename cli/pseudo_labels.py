"""`noisy-student pseudo-labels`: the guesses of generations about pools; list, measure, cancel and delete them."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.client import API
from cli.invocation import get_invocation
from cli.output import show_bytes

app = typer.Typer(no_args_is_help=True, help="Pseudo-label sets: list, disk, cancel, delete.")
SetId = Annotated[str, typer.Argument(metavar="SET", help="Its id.")]


@app.command("list")
def list_sets(context: typer.Context, *, run: Annotated[str | None, typer.Option(help="Only this run's.")] = None) -> None:
    """List pseudo-label sets, newest first."""
    invocation = get_invocation(context)
    found = list(invocation.client.pages(f"{API}/pseudo-label-sets", run_id=run, most=200))
    columns = {"set": "id", "status": "status", "run": "run_id", "iteration": "iteration", "generation": "generation_id"}
    invocation.output.table(
        found, columns | {"images": "num_images", "shards": "num_shards", "done": "shards_done", "created": "created_at"}
    )


@app.command("disk")
def disk(context: typer.Context, *, pseudo_label_set: SetId) -> None:
    """Show how much storage a set uses."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/pseudo-label-sets/{pseudo_label_set}/disk-use")
    size, freed = show_bytes(found["num_bytes"]), show_bytes(found["freed_bytes"])
    invocation.output.result(found, f"{size} in {found['num_files']} files; deleting it would free {freed}")


@app.command("cancel")
def cancel(context: typer.Context, *, pseudo_label_set: SetId) -> None:
    """Stop labeling a pool outside of any run."""
    invocation = get_invocation(context)
    found = invocation.client.post(f"{API}/pseudo-label-sets/{pseudo_label_set}/cancel")
    invocation.output.result(found, f"pseudo-label set {pseudo_label_set} is canceled")


@app.command("delete")
def delete(context: typer.Context, *, pseudo_label_set: SetId) -> None:
    """Delete a set that belongs to no run, with every guess."""
    invocation = get_invocation(context)
    invocation.client.delete(f"{API}/pseudo-label-sets/{pseudo_label_set}")
    invocation.output.result({"deleted": pseudo_label_set}, f"pseudo-label set {pseudo_label_set} is gone; its files follow within hours")
