"""`noisy-student recipes`: the presets, with every value that `--set` can change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from cli.client import API
from cli.invocation import get_invocation

app = typer.Typer(no_args_is_help=True, help="Recipes: list the presets, show one.")


@app.command("list")
def list_recipes(context: typer.Context) -> None:
    """List the presets."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/recipes")["items"]
    rows = [{"name": one["name"]} | _row(one["recipe"]) for one in found]
    columns = {"preset": "name", "pixels": "pixels", "teacher": "teacher", "last student": "student", "iterations": "iterations"}
    invocation.output.table(found if invocation.output.as_json else rows, columns)


def _row(recipe: dict[str, Any]) -> dict[str, Any]:
    teacher, student = (config["network"]["architecture"] for config in (recipe["teacher"], recipe["students"][-1]))
    return {"pixels": recipe["image"]["size"], "teacher": teacher, "student": student, "iterations": recipe["iterations"]["count"]}


@app.command("show")
def show(context: typer.Context, *, name: Annotated[str, typer.Argument(help="A preset, for example small-32px.")]) -> None:
    """Show every value of a preset by the path that `--set` takes."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/recipes/{name}")
    invocation.output.result(found, "\n".join(f"{path}={value}" for path, value in list_values(found["recipe"])))


def list_values(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, value) of everything in a recipe, as `--set` reads it: `students.0.ratio`, `3`."""
    if isinstance(config, dict) and config:
        parts = list(config.items())
    elif isinstance(config, list) and any(isinstance(one, dict) for one in config):
        parts = list(enumerate(config))
    else:
        yield path, config if isinstance(config, str) else json.dumps(config)
        return
    for name, value in parts:
        yield from list_values(value, f"{path}.{name}" if path else str(name))
