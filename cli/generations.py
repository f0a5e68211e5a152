"""`noisy-student generations`, `promote`, `rollback`: what was trained, how good it is, and which of them answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import API, ApiProblem, Client
from cli.datasets import finish
from cli.invocation import get_invocation
from cli.output import show_accuracy

app = typer.Typer(no_args_is_help=True, help="Generations: list, show, compare, import, delete.")
Alias = Annotated[str, typer.Option(help="The name that /predict answers by.")]


@app.command("list")
def list_generations(
    context: typer.Context,
    *,
    run: Annotated[str | None, typer.Option(help="Only this run's.")] = None,
    role: Annotated[str | None, typer.Option(help="Only teacher, student, control or imported ones.")] = None,
) -> None:
    """List generations, newest first."""
    invocation = get_invocation(context)
    found = list(invocation.client.pages(f"{API}/generations", run_id=run, role=role, most=200))
    if invocation.output.as_json:
        invocation.output.result(found, "")
        return
    aliases = {one["generation_id"]: one["name"] for one in invocation.client.get(f"{API}/aliases")["items"]}
    columns = {
        "generation": "id",
        "run": "run_id",
        "role": "role",
        "iteration": "iteration",
        "network": "architecture",
        "parameters": "num_parameters",
    }
    columns |= {"validation top-1 (95 %)": "validation", "test top-1 (95 %)": "test", "alias": "alias"}
    invocation.output.table([_row(one) | {"alias": aliases.get(one["id"])} for one in found], columns)


def _row(generation: dict[str, Any]) -> dict[str, Any]:
    metrics = generation["metrics"]
    return generation | {split: show_accuracy(metrics.get(split)) for split in ("validation", "test")}


@app.command("show")
def show(context: typer.Context, *, generation: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Show one generation: figures, per class, files."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/generations/{generation}")
    if invocation.output.as_json:
        invocation.output.result(found, "")
        return
    facts = {
        "role": "role",
        "iteration": "iteration",
        "network": "architecture",
        "parameters": "num_parameters",
        "teacher": "teacher_generation_id",
    }
    lines = [f"{found['id']}", *(f"  {name}: {found[key]}" for name, key in facts.items() if found[key] is not None)]
    for split in ("validation", "test"):
        measured = found["metrics"].get(split)
        if measured:
            lines.append(
                f"  {split}: top-1 {show_accuracy(measured)}, top-5 {100 * measured['top5']:.1f} %, calibration error {measured['ece']:.3f}"
            )
    invocation.output.say("\n".join(lines))
    classes = (found["metrics"].get("test") or found["metrics"].get("validation") or {}).get("per_class") or []
    if classes and isinstance(classes, list):
        invocation.output.table(classes, {name: name for name in classes[0]}, title="per class")
    invocation.output.table(found["files"], {"file": "name", "bytes": "num_bytes"})


@app.command("compare")
def compare(
    context: typer.Context,
    *,
    generation: Annotated[str, typer.Argument(help="The one in question.")],
    other: Annotated[str, typer.Argument(help="The one it is compared with.")],
    split: Annotated[str, typer.Option(help="validation, or test.")] = "validation",
) -> None:
    """Compare two generations image by image."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/generations/{generation}/compare", **{"with": other, "split": split})
    invocation.output.result(found, describe_comparison(found, split))


def describe_comparison(found: dict[str, Any], split: str) -> str:
    """`+2.1 points (95 %: +0.4 to +3.9) on 150 validation images`, and which classes lost."""
    top1 = found["top1"]
    low, high = top1["interval"]
    interval = f"95 %: {100 * low:+.1f} to {100 * high:+.1f}"
    lines = [f"{100 * top1['difference']:+.1f} points top-1 ({interval}) on {found['num_images']} {split} images"]
    lines += [f"  worse in {one['class_name']}: {100 * one['difference']:+.1f} points" for one in found["regressions"][:5]]
    return "\n".join(lines)


@app.command("import")
def import_generation(
    context: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="With config.json and model.safetensors, below one of the service's dataset roots.")],
    name: Annotated[str, typer.Option(help="A word for people.")],
    class_name: Annotated[list[str] | None, typer.Option(help="In the order of the outputs; repeat it [default: config.json's].")] = None,
) -> None:
    """Bring your own teacher: safetensors as timm writes them."""
    invocation = get_invocation(context)
    body = {"folder": str(folder if folder.is_absolute() else Path.cwd() / folder), "name": name, "class_names": class_name or None}
    job = finish(invocation, invocation.client.post(f"{API}/generations/import", body), f"importing {name}")
    invocation.output.result(job, f"generation {job['resources']['generation_id']}")


@app.command("delete")
def delete(context: typer.Context, *, generation: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Delete a generation that nothing needs."""
    invocation = get_invocation(context)
    invocation.client.delete(f"{API}/generations/{generation}")
    invocation.output.result({"deleted": generation}, f"generation {generation} is gone")


def promote(
    context: typer.Context,
    *,
    generation: Annotated[str, typer.Argument(help="The generation that shall answer.")],
    alias: Alias = "production",
    force: Annotated[bool, typer.Option("--force", help="Even if the gate finds it worse; needs --reason.")] = False,
    reason: Annotated[str | None, typer.Option(help="Kept in the history.")] = None,
) -> None:
    """Let a generation answer /predict, if validation does not show that it is worse than the one that answers now."""
    invocation = get_invocation(context)
    if force and not reason:
        raise typer.BadParameter("--force needs --reason; the history keeps it", param_hint="--reason")
    moved = move_to(invocation.client, alias, generation, force=force, reason=reason)
    invocation.output.result(
        moved, f"{alias} is now {moved['generation_id']} (version {moved['version']}){describe_gate(moved.get('gate'))}"
    )


def move_to(client: Client, alias: str, generation: str, *, force: bool = False, reason: str | None = None) -> dict[str, Any]:
    """Promote with the ETag that was just read; returns the alias, with the gate's comparison as `gate`."""
    headers = _precondition(client, alias)
    body = {"generation": generation, "force": force, "reason": reason}
    moved: dict[str, Any] = client.request("PUT", f"{API}/aliases/{alias}", body=body, headers=headers).json()
    return moved | {"gate": _last_gate(client, alias, moved["version"])}


def _precondition(client: Client, alias: str) -> dict[str, str]:
    """If-Match with the version that is there now, or the wish that there be none."""
    try:
        response = client.request("GET", f"{API}/aliases/{alias}", again=True)
    except ApiProblem as problem:
        if problem.status != 404:
            raise
        return {"If-None-Match": "*"}
    return {"If-Match": response.headers["ETag"]}


def _last_gate(client: Client, alias: str, version: int) -> dict[str, Any] | None:
    for move in client.pages(f"{API}/aliases/{alias}/history"):
        if move["version"] == version:
            return dict(move["gate"]) if move["gate"] else None
    return None


def describe_gate(gate: dict[str, Any] | None) -> str:
    """What the gate saw, as the rest of a sentence."""
    if not gate or "comparison" not in gate:
        return ""
    return f"; the gate: {describe_comparison(gate['comparison'], 'validation').splitlines()[0]}"


def rollback(
    context: typer.Context, alias: Alias = "production", reason: Annotated[str | None, typer.Option(help="Kept in the history.")] = None
) -> None:
    """Let the generation answer again that did before the last promotion."""
    invocation = get_invocation(context)
    path = f"{API}/aliases/{alias}"
    headers = {"If-Match": invocation.client.request("GET", path, again=True).headers["ETag"]}
    body = {} if reason is None else {"reason": reason}
    moved = invocation.client.request("POST", f"{path}/rollback", body=body, headers=headers).json()
    invocation.output.result(moved, f"{alias} is again {moved['generation_id']} (version {moved['version']})")
