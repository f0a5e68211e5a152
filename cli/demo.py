"""`noisy-student demo`: the whole loop on real handwritten digits, over HTTP, in a few minutes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import API, ApiProblem, Client
from cli.datasets import describe_version, finish
from cli.digits import LABELED_PER_CLASS, DigitFolders, write_digits
from cli.generations import describe_gate, move_to
from cli.invocation import Invocation, find_key, get_invocation, read_service_file
from cli.output import Output, show_accuracy, show_duration
from cli.predict import ask
from cli.processes import dying_with_parent, is_locked
from cli.watch import watch_run
from core.errors import DataDirectoryRefused, SetupError
from core.settings import Settings

START_SECONDS = 60.0
STOP_SECONDS = 60.0


def demo(
    context: typer.Context,
    *,
    directory: Annotated[Path, typer.Option(help="Where the demo's service keeps its data; stays afterwards.")] = Path(
        "noisy-student-data/demo"
    ),
    seed: Annotated[int, typer.Option(help="Cuts the digits and seeds the training.", min=0)] = 0,
    iterations: Annotated[int, typer.Option(help="How many students follow each other.", min=1)] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running at the end.")] = False,
) -> int:
    """See the whole loop on 1 797 real handwritten digits: teacher, pseudo-labels, students, promotion, predictions.

    With --url on a service that runs already; the folder `datasets` in --directory must be one of its dataset roots.
    """
    started = time.monotonic()
    given = get_invocation(context)
    output = given.output
    settings = Settings(data_directory=directory.resolve())
    if given.url is not None:
        code = _show_the_loop(given, _write_digits(settings, output, seed=seed), seed=seed, iterations=iterations)
        output.say(f"\nthe demo took {show_duration(time.monotonic() - started)}")
        return code
    if is_locked(settings.data_directory / "lock"):
        raise DataDirectoryRefused(f"a service is running over {directory}; stop it, or name another folder with --directory")
    folders = _write_digits(settings, output, seed=seed)
    with running_service(settings, output, keep=keep) as client:
        invocation = Invocation(url=client.url, key=None, output=output)
        invocation.client = client
        code = _show_the_loop(invocation, folders, seed=seed, iterations=iterations)
        if code == 0:
            _say_what_next(output, client.url, settings, keep=keep)
    output.say(f"\nthe demo took {show_duration(time.monotonic() - started)}")
    return code


def _write_digits(settings: Settings, output: Output, *, seed: int) -> DigitFolders:
    folders = write_digits(settings.data_directory / "datasets" / f"digits-{seed}", seed=seed)
    output.say(
        f"scikit-learn's digits as PNG files in {folders.labeled.parent}:\n"
        f"  {folders.num_labeled} labeled ({LABELED_PER_CLASS} of each digit), {folders.num_unlabeled} without labels, "
        f"{folders.num_test} for testing"
    )
    return folders


def _show_the_loop(invocation: Invocation, folders: DigitFolders, *, seed: int, iterations: int) -> int:
    output = invocation.output
    # Names of their own, because the data directory outlives the demo.
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = {part: f"digits-{part}-{stamp}" for part in ("labeled", "unlabeled", "test")}
    _register(invocation, folders, names)
    body = {
        "datasets": names,
        "preset": "digits",
        "recipe": {"seed": seed, "iterations": {"control": True}},
        "iterations": iterations,
        "name": "demo",
    }
    run = invocation.client.post(f"{API}/runs", body)
    output.say(f"\nrun {run['id']}: a teacher from the labels, then {iterations} times pseudo-labels, student and control\n")
    code = watch_run(invocation, run["id"])
    if code != 0:
        return code
    lineage = invocation.client.get(f"{API}/runs/{run['id']}/lineage")["generations"]
    best = choose_student(lineage)
    # A demo before this one may have left its generation in production.
    taken = {alias["name"] for alias in invocation.client.get(f"{API}/aliases")["items"]}
    alias = "production" if "production" not in taken else f"demo-{stamp}"
    _promote(invocation, alias, lineage, best)
    _predict(invocation, alias, folders)
    return 0


def _register(invocation: Invocation, folders: DigitFolders, names: dict[str, str]) -> None:
    places = {"labeled": (folders.labeled, "labeled"), "unlabeled": (folders.unlabeled, "unlabeled"), "test": (folders.test, "evaluation")}
    for part, (folder, kind) in places.items():
        body = {"name": names[part], "kind": kind, "source": {"folder": str(folder)}}
        job = invocation.client.post(f"{API}/datasets", body)
        finish(invocation, job, f"reading {part}")
        version = invocation.client.get(f"{API}/dataset-versions/{job['resources']['dataset_version_id']}")
        invocation.output.say(describe_version(names[part], version).splitlines()[0])


def choose_student(lineage: list[dict[str, Any]]) -> dict[str, Any]:
    """The student that validation likes best, the later one of equals; test has no say."""
    students = [entry for entry in lineage if entry["role"] == "student"]
    return max(students, key=lambda entry: (entry["validation"]["top1"], entry["iteration"]))


def _promote(invocation: Invocation, alias: str, lineage: list[dict[str, Any]], best: dict[str, Any]) -> None:
    output, client = invocation.output, invocation.client
    teacher = lineage[0]
    moved = move_to(client, alias, teacher["generation_id"])
    output.say(f"\npromoted the teacher: alias `{alias}` is {moved['generation_id']}")
    try:
        moved = move_to(client, alias, best["generation_id"])
    except ApiProblem as problem:
        if problem.code != "gate_refused":
            raise
        output.say(f"the gate keeps the teacher: {problem.detail}")
        return
    output.say(
        f"promoted the student of iteration {best['iteration']}: alias `{alias}` is {moved['generation_id']}{describe_gate(moved['gate'])}"
    )
    output.say(f"on test it has {show_accuracy(best['test'])}, the teacher {show_accuracy(teacher['test'])}; test chose nothing")


def _predict(invocation: Invocation, alias: str, folders: DigitFolders) -> None:
    files = [min(folder.glob("*.png")) for folder in sorted(folders.test.iterdir())]
    answers = [ask(invocation.client, path, alias=alias, top_k=3) for path in files]
    rows = [
        {
            "file": f"test/{path.parent.name}/{path.name}",
            "is a": path.parent.name,
            "says": answer["label"],
            "confidence": answer["confidence"],
        }
        for path, answer in zip(files, answers, strict=True)
    ]
    invocation.output.table(
        rows, {name: name for name in ("file", "is a", "says", "confidence")}, title="\n/predict about files nobody trained on"
    )


def _say_what_next(output: Output, url: str, settings: Settings, *, keep: bool) -> None:
    command = f"noisy-student up --data-directory {_shown(settings.data_directory)}"
    where = f"it goes on running: {url}/docs" if keep else f"start it again with `{command}` and open http://127.0.0.1:8000/docs"
    output.say(
        f"""
the service's pages try every request; {where}

your own images, below a folder per class:
  noisy-student up --dataset-root ~/my-images          (in a terminal of its own)
  noisy-student datasets add photos ~/my-images/train --kind labeled
  noisy-student datasets add photos-test ~/my-images/test --kind evaluation
  noisy-student datasets split photos --labeled 200 --unlabeled rest
  noisy-student runs start --labeled photos-labeled --unlabeled photos-unlabeled --test photos-test --preset photos-224
      (small-32px for images of about that size)
  noisy-student watch
  noisy-student promote GENERATION && noisy-student predict ~/my-images/test/*/*.jpg"""
    )


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def running_service(settings: Settings, output: Output, *, keep: bool) -> Iterator[Client]:
    """`noisy-student up` over the data directory on a free port, as a process of its own; stopped at the end unless `keep`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NOISY_STUDENT_")}
    environment |= {"NOISY_STUDENT_DATA_DIRECTORY": str(settings.data_directory), "NOISY_STUDENT_PORT": str(_free_port())}
    settings.data_directory.mkdir(parents=True, exist_ok=True)
    log_path = settings.data_directory / "service.log"
    settings.service_file.unlink(missing_ok=True)
    with log_path.open("ab") as log:
        # A session of its own: Ctrl-C stops the demo, which then stops the service in order. A killed demo leaves no service behind.
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "up"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=None if keep else dying_with_parent(signal.SIGTERM),  # noqa: PLW1509  the demo has one thread
        )
    ended_well = False
    try:
        url = _wait_until_ready(process, settings, log_path)
        output.say(f"the service runs at {url}, its log in {log_path}")
        client = Client(url, find_key(settings))
        yield client
        client.close()
        ended_well = True
    finally:
        if not (keep and ended_well):
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], settings: Settings, log_path: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        service = read_service_file(settings.service_file)
        if service is not None:
            return service["url"]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    last = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing in its log"]
    raise SetupError(f"the service did not start: {last[0]} (all of it in {log_path})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
