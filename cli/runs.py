"""`noisy-student runs` and `iterate`: start runs, steer them, add iterations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import API
from cli.disk import show_run_use
from cli.invocation import get_invocation
from cli.watch import newest_run, report_run, watch_run
from ml.errors import RecipeError
from ml.recipes import PRESETS
from ml.validation import load_json

app = typer.Typer(no_args_is_help=True, help="Runs: start, list, show, pause, resume, cancel, extend, disk, delete.")

RunId = Annotated[str | None, typer.Argument(help="Id of a run [default: the newest].")]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of the recipe, for example students.0.ratio=5; may be repeated.", metavar="PATH=VALUE"),
]


@app.command("start")
def start(
    context: typer.Context,
    *,
    labeled: Annotated[str, typer.Option(help="Dataset: NAME, NAME:NUMBER or `dsv_…`.")],
    unlabeled: Annotated[str, typer.Option(help="Likewise.")],
    validation: Annotated[str | None, typer.Option(help="Likewise [default: cut from the labeled images].")] = None,
    test: Annotated[str | None, typer.Option(help="Likewise; only reported, chooses nothing.")] = None,
    preset: Annotated[str | None, typer.Option(help="digits, small-32px, photos-224, paper-b0 … paper-l2.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON file laid over the preset; `-` reads stdin.", allow_dash=True)] = None,
    values: Set = None,
    iterations: Annotated[str | None, typer.Option(help="A number, or `manual` [default: the recipe's].")] = None,
    name: Annotated[str | None, typer.Option(help="A word for people.")] = None,
    initial_generation: Annotated[str | None, typer.Option(help="A generation that takes the first teacher's place.")] = None,
    priority: Annotated[int, typer.Option(help="Jobs of the higher one are started first.", min=-100, max=100)] = 0,
    follow: Watch = False,
) -> int:
    """Start a run: a teacher from the labels, then iterations of pseudo-labels and students."""
    invocation = get_invocation(context)
    if preset is None and recipe is None:
        raise typer.BadParameter(f"name one of {', '.join(PRESETS)}, or give a --recipe", param_hint="--preset")
    body: dict[str, Any] = {
        "datasets": {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test},
        "preset": preset,
        "recipe": set_values(_read_recipe(recipe), values or []),
        "name": name,
        "initial_generation": initial_generation,
        "priority": priority,
    }
    if iterations is not None:
        body["iterations"] = parse_iterations(iterations)
    run = invocation.client.post(f"{API}/runs", body)
    invocation.output.result(run, f"run {run['id']} started: {describe_plan(run)}")
    if follow and not invocation.output.as_json:
        return watch_run(invocation, run["id"])
    invocation.output.say(f"follow it with: noisy-student watch {run['id']}")
    return 0


def describe_plan(run: dict[str, Any]) -> str:
    """`32 px: test_resnet (3000 steps of 256), then 2 iterations with a student of …; device auto`: what a person is in for."""
    recipe, iterations = run["recipe"], run["iterations_wanted"]
    size = recipe["image"]["size"]
    teacher = "an initial generation" if run["initial_generation_id"] else _describe_training(recipe["teacher"])
    if iterations == 0:
        return f"{size} px: {teacher}, and nothing more until `noisy-student iterate`; device {recipe['runtime']['device']}"
    student = recipe["students"][min(iterations, len(recipe["students"])) - 1]
    plan = f"{iterations} iteration{'s' if iterations > 1 else ''} with a student of {_describe_training(student)}"
    control = " and its control" if recipe["iterations"]["control"] else ""
    return f"{size} px: {teacher}, then {plan}{control}; device {recipe['runtime']['device']}"


def _describe_training(config: dict[str, Any]) -> str:
    network, training = config["network"], config["training"]
    length = f"{training['steps']} steps" if training["steps"] else f"{training['epochs']} epochs, batches"
    return f"{network['architecture']} ({length} of {training['batch_size']} labeled images)"


def parse_iterations(text: str) -> int | str:
    """A whole number, or `manual`."""
    if text != "manual" and not text.isdecimal():
        raise typer.BadParameter(f"{text!r} must be a whole number or `manual`", param_hint="--iterations")
    return text if text == "manual" else int(text)


def _read_recipe(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        found = load_json(text)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--recipe") from error
    except (RecipeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--recipe") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} must hold a JSON object", param_hint="--recipe")
    return found


def set_values(recipe: dict[str, Any], values: list[str]) -> dict[str, Any]:
    """Lay `PATH=VALUE` pairs over the recipe.

    Values are JSON where they can be read as JSON, else text. A number in a path counts list items.
    """
    for one in values:
        path, found, text = one.partition("=")
        if not found or not path:
            raise typer.BadParameter(f"{one!r} must look like students.0.ratio=5", param_hint="--set")
        recipe = _laid(recipe, path.split("."), _value_of(text, one), one)
    return recipe


def _value_of(text: str, pair: str) -> Any:
    try:
        json.loads(text)
    except ValueError:
        return text
    try:
        return load_json(text)
    except RecipeError as error:
        raise typer.BadParameter(f"{pair!r}: {error}", param_hint="--set") from error


def _laid(onto: Any, path: list[str], value: Any, pair: str) -> Any:
    if not path:
        return value
    name, *rest = path
    if name.isdecimal():
        items = list(onto) if isinstance(onto, list) else []
        if int(name) > len(items):
            raise typer.BadParameter(
                f"{pair!r}: a list is given from its item 0 on; set the items before item {name} too", param_hint="--set"
            )
        changed = _laid(items[int(name)] if int(name) < len(items) else {}, rest, value, pair)
        return [*items[: int(name)], changed, *items[int(name) + 1 :]]
    fields = dict(onto) if isinstance(onto, dict) else {}
    return fields | {name: _laid(fields.get(name, {}), rest, value, pair)}


@app.command("list")
def list_runs(
    context: typer.Context, status: Annotated[str | None, typer.Option(help="Only active, paused, completed … ones.")] = None
) -> None:
    """List runs, newest first."""
    invocation = get_invocation(context)
    runs = list(invocation.client.pages(f"{API}/runs", status=status, most=200))
    rows = [
        run | {"made": f"{run['iterations'][-1]['number']} of {run['iterations_wanted']}", "phase": run["iterations"][-1]["phase"]}
        for run in runs
    ]
    columns = {"run": "id", "name": "name", "status": "status", "iteration": "made", "phase": "phase", "started": "created_at"}
    invocation.output.table(runs if invocation.output.as_json else rows, columns)


@app.command("show")
def show(context: typer.Context, *, run: RunId = None) -> None:
    """Show a run, its iterations and its lineage."""
    invocation = get_invocation(context)
    found = invocation.client.get(f"{API}/runs/{run or newest_run(invocation.client)}")
    if invocation.output.as_json:
        invocation.output.result(found, "")
        return
    columns = {
        "iteration": "number",
        "phase": "phase",
        "teacher": "teacher_generation_id",
        "generation": "generation_id",
        "control": "control_generation_id",
    }
    invocation.output.table(
        found["iterations"], columns | {"pseudo-labels": "pseudo_label_set_id"}, title=f"run {found['id']} ({found['name']})"
    )
    report_run(invocation, found)


def _move(context: typer.Context, run: str | None, verb: str, done: str) -> None:
    invocation = get_invocation(context)
    found = invocation.client.post(f"{API}/runs/{run or newest_run(invocation.client)}/{verb}")
    invocation.output.result(found, f"run {found['id']} {done}")


@app.command("pause")
def pause(context: typer.Context, *, run: RunId = None) -> None:
    """Start no further job of a run; what runs goes on to its end."""
    _move(context, run, "pause", "is paused; go on with: noisy-student runs resume")


@app.command("resume")
def resume(context: typer.Context, *, run: RunId = None) -> None:
    """Go on with a paused run."""
    _move(context, run, "resume", "goes on")


@app.command("cancel")
def cancel(context: typer.Context, *, run: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Stop a run for good; what it made stays."""
    _move(context, run, "cancel", "is canceled; its generations stay")


@app.command("disk")
def disk(context: typer.Context, *, run: RunId = None) -> None:
    """Show how much storage a run uses, by what, and what deleting it would free."""
    invocation = get_invocation(context)
    show_run_use(invocation, run or newest_run(invocation.client))


@app.command("delete")
def delete(context: typer.Context, *, run: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Delete a run that has ended, with its generations, if nothing else needs one of them. Its datasets stay."""
    invocation = get_invocation(context)
    invocation.client.delete(f"{API}/runs/{run}")
    invocation.output.result({"deleted": run}, f"run {run} is gone; its files follow within hours")


@app.command("extend")
def extend(
    context: typer.Context,
    *,
    run: RunId = None,
    iterations: Annotated[int, typer.Option(help="How many more.", min=1)] = 1,
    follow: Watch = False,
) -> int:
    """Ask for more iterations."""
    invocation = get_invocation(context)
    run_id = run or newest_run(invocation.client)
    found = invocation.client.post(f"{API}/runs/{run_id}/extend", {"iterations": iterations})
    invocation.output.result(found, f"run {run_id} will make {found['iterations_wanted']} iterations")
    return watch_run(invocation, run_id) if follow and not invocation.output.as_json else 0


def iterate(
    context: typer.Context,
    *,
    run: RunId = None,
    teacher: Annotated[str | None, typer.Option(help="The generation that labels [default: the newest].")] = None,
    ratio: Annotated[int | None, typer.Option(help="Pseudo-labeled images per labeled one.", min=1)] = None,
    unlabeled: Annotated[str | None, typer.Option(help="Another pool, or a newer version of it.")] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="One value of the student, for example noise.randaugment_magnitude=15; may be repeated.", metavar="PATH=VALUE"
        ),
    ] = None,
    follow: Watch = False,
) -> int:
    """Make exactly one more iteration: the newest generation labels, a student learns from it."""
    invocation = get_invocation(context)
    run_id = run or newest_run(invocation.client)
    student = set_values({}, values or [])
    given = {"teacher": teacher, "ratio": ratio, "unlabeled": unlabeled, "student": student or None}
    iteration = invocation.client.post(
        f"{API}/runs/{run_id}/iterations", {name: value for name, value in given.items() if value is not None}
    )
    invocation.output.result(iteration, f"iteration {iteration['number']} of run {run_id} started")
    if not follow or invocation.output.as_json:
        return 0

    def is_over(found: dict[str, Any]) -> bool:
        return bool(found["iterations"][iteration["number"]]["phase"] in ("done", "failed", "canceled"))

    return watch_run(invocation, run_id, until=is_over)
