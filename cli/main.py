"""`noisy-student`: every verb, the global options, and what a person or a program gets to know when something is wrong.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or set-up, 3 nothing answers at the service's address.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cli import (
    backup,
    datasets,
    demo,
    disk,
    doctor,
    generations,
    jobs,
    keys,
    predict,
    pseudo_labels,
    recipes,
    restore,
    runs,
    up,
    watch,
    workers,
)
from cli.client import ApiProblem, JobFailed, NotReachable
from cli.invocation import DATA_DIRECTORY_VARIABLE, Invocation
from cli.output import Output
from core.errors import ServiceError, SetupError
from core.version import VERSION

OK, REFUSED, USAGE, NOT_REACHABLE = range(4)
GLOBAL_OPTIONS = {"--url": True, "--key": True, "--data-directory": True, "--json": False}
"""Option → whether a value follows. They may stand anywhere on the line."""

app = typer.Typer(
    name="noisy-student",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback()
def global_options(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Address of the service; default: the one running over the data directory.")] = None,
    key: Annotated[str | None, typer.Option(help="API key; default: NOISY_STUDENT_API_KEY, else the data directory's admin.key.")] = None,
    data_directory: Annotated[Path | None, typer.Option(help="Default: NOISY_STUDENT_DATA_DIRECTORY, else ./noisy-student-data.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for programs.")] = False,
) -> None:
    """Noisy Student training for image classification: few labeled images, many unlabeled ones, a better classifier.

    These options may stand anywhere on the line.
    """
    if data_directory is not None:
        # Through the environment, so that the processes that `up` starts see it too.
        os.environ[DATA_DIRECTORY_VARIABLE] = str(data_directory)
    invocation = Invocation(url=url, key=key, output=Output(as_json=json))
    context.obj = invocation
    context.call_on_close(invocation.close)


app.command("up")(up.up)
app.command("migrate")(up.migrate)
app.add_typer(datasets.app, name="datasets")
app.add_typer(recipes.app, name="recipes")
app.add_typer(runs.app, name="runs")
app.command("iterate")(runs.iterate)
app.command("watch")(watch.watch)
app.add_typer(generations.app, name="generations")
app.add_typer(pseudo_labels.app, name="pseudo-labels")
app.command("promote")(generations.promote)
app.command("rollback")(generations.rollback)
app.command("predict")(predict.predict)
app.add_typer(jobs.app, name="jobs")
app.add_typer(workers.app, name="workers")
app.add_typer(keys.app, name="keys")
app.command("disk")(disk.disk)
app.command("gc")(disk.collect_garbage)
app.command("backup")(backup.backup)
app.command("restore")(restore.restore)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


@app.command("version")
def version(context: typer.Context) -> None:
    """Print the version."""
    context.obj.output.result({"version": VERSION}, VERSION)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the `noisy-student` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(given))


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    output = Output(as_json="--json" in arguments)
    try:
        code = app(args=hoist_global_options(arguments), prog_name="noisy-student", standalone_mode=False)
    except typer.Abort:
        # Ctrl-C, as shells report it.
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except typer.TyperException as error:
        show = getattr(error, "show", None)
        if show is None or output.as_json:
            output.error(error.format_message())
        else:
            # With the command's usage in front.
            show()
        return USAGE
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`); what is left to print has nobody to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except tuple(_ENDINGS) as error:
        code, message, details = next(make(error) for cls, make in _ENDINGS.items() if isinstance(error, cls))
        output.error(message, details)
    return code if isinstance(code, int) else OK


def hoist_global_options(arguments: Sequence[str]) -> list[str]:
    """Move the global options before the verb: people type them where they think of them."""
    hoisted: list[str] = []
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        name, has_value, _ = word.partition("=")
        if word == "--":
            rest += [word, *remaining]
            break
        if name not in GLOBAL_OPTIONS:
            rest.append(word)
            continue
        hoisted.append(word)
        if GLOBAL_OPTIONS[name] and not has_value and remaining:
            hoisted.append(remaining.pop(0))
    return hoisted + rest


def _problem(error: Any) -> tuple[int, str, dict[str, Any]]:
    lines = [error.detail]
    others = [found for found in error.errors if found.get("message") and found["message"] not in error.detail]
    lines += [f"  {found.get('pointer') or found.get('parameter') or ''}: {found['message']}" for found in others[:5]]
    hints = {
        401: "  the key comes from --key, NOISY_STUDENT_API_KEY, or admin.key in the data directory",
        500: f"  request {error.request_id}: the service's log has more",
    }
    if error.status in hints:
        lines.append(hints[error.status])
    return REFUSED, "\n".join(lines), error.to_dict()


def _settings_problem(error: Any) -> tuple[int, str, dict[str, Any]]:
    found = [f"NOISY_STUDENT_{'_'.join(str(part) for part in one['loc'][:1]).upper()}: {one['msg']}" for one in error.errors()]
    return USAGE, "; ".join(found), {}


_ENDINGS: dict[type[Exception], Callable[[Any], tuple[int, str, dict[str, Any]]]] = {
    ApiProblem: _problem,
    JobFailed: lambda error: (REFUSED, str(error), {"job": error.job}),
    NotReachable: lambda error: (NOT_REACHABLE, str(error), {}),
    SetupError: lambda error: (USAGE, error.message, dict(error.details)),
    ServiceError: lambda error: (REFUSED, error.message, dict(error.details)),
    ValidationError: _settings_problem,
}
"""What a person gets to read for each kind of error; every other one is a surprise and shows its trace."""


if __name__ == "__main__":
    main()
