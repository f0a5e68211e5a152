"""`noisy-student disk` and `gc`: how much storage is in use by what, and removing what nobody needs."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from cli.client import API
from cli.invocation import Invocation, get_invocation
from cli.output import show_bytes
from cli.up import existing_database
from core.db.disk_use import Use
from core.db.retention import measure_kept
from core.logs import configure_logs
from core.settings import PREFIX
from core.storage import make_storage
from workers.garbage import Collected, collect


def disk(context: typer.Context) -> None:
    """Show how much storage is in use: in all, by kinds of files, and by run."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/disk-use")
    if invocation.output.as_json:
        invocation.output.result(found, "")
        return
    invocation.output.say(f"{show_bytes(found['num_bytes'])} in {found['num_files']} files")
    show_uses(invocation, found["kinds"], "kind")
    rows = [run | {"size": show_bytes(run["num_bytes"])} for run in found["runs"]]
    invocation.output.table(rows, {"run": "id", "name": "name", "status": "status", "files": "num_files", "size": "size"})


def show_run_use(invocation: Invocation, run_id: str) -> None:
    """What one run uses, and what deleting it would free."""
    found = invocation.client.get(f"{API}/runs/{run_id}/disk-use")
    if invocation.output.as_json:
        invocation.output.result(found, "")
        return
    size, freed, shared = (show_bytes(found[name]) for name in ("num_bytes", "freed_bytes", "shared_bytes"))
    invocation.output.say(
        f"run {run_id}: {size} in {found['num_files']} files; deleting it would free {freed}, {shared} are needed elsewhere"
    )
    show_uses(invocation, found["kinds"], "kind")
    parts = [one | {"of": "generation"} for one in found["generations"]] + [
        one | {"of": "pseudo-label set"} for one in found["pseudo_label_sets"]
    ]
    show_uses(invocation, parts, "id")


def show_uses(invocation: Invocation, uses: list[dict[str, Any]], name: str) -> None:
    """A table of sizes."""
    rows = [one | {"size": show_bytes(one["num_bytes"])} for one in uses]
    invocation.output.table(rows, {name: name, "files": "num_files", "size": "size"})


def collect_garbage(
    context: typer.Context,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and what keeps the rest.")] = False,
) -> None:
    """Remove what is old by the settings (NOISY_STUDENT_KEEP_…_DAYS) and stored files that nothing names, as housekeeping does."""
    invocation = get_invocation(context)
    settings = invocation.settings
    # What goes is told by the tables, or as JSON to a program; a line for each file is for housekeeping's log.
    configure_logs(json_lines=False, least=logging.WARNING)
    with existing_database(settings) as database:
        collected = collect(database, make_storage(settings), settings, dry_run=dry_run)
        with database.reading() as session:
            kept = measure_kept(session)
    if invocation.output.as_json:
        rest = [{"kind": kind, "kept_by": keeper, "num_files": use.num_files, "num_bytes": use.num_bytes} for kind, keeper, use in kept]
        invocation.output.result(collected.to_dict() | {"dry_run": dry_run, "kept": rest}, "")
        return
    _tell(invocation, collected, kept, "would go" if dry_run else "went")


def _tell(invocation: Invocation, collected: Collected, kept: list[tuple[str, str, Use]], did: str) -> None:
    rows = [
        {
            "what": one.what,
            "number": one.num,
            "size": show_bytes(one.freed_bytes),
            "why": f"older than {PREFIX}{one.setting.upper()}={one.days:g}",
        }
        for one in collected.expired
    ]
    if collected.num_removed:
        rows.append({"what": "stored files", "number": collected.num_removed, "size": "", "why": "no row names them"})
    invocation.output.table(rows, {did: "what", "number": "number", "size": "size", "because": "why"})
    if collected.held_by_backup:
        invocation.output.say("a backup is being made: stored files stay until it has ended")
    rest = [{"what": kind, "files": use.num_files, "size": show_bytes(use.num_bytes), "keeper": keeper} for kind, keeper, use in kept]
    invocation.output.table(rest, {"stays": "what", "files": "files", "size": "size", "because of": "keeper"})
