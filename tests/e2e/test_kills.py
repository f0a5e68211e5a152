"""SIGKILL in the middle of an epoch, of the child, the supervisor and everything: the run goes on and ends with the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.processes import Service, embedded, start_embedded, wait_until
from tests.e2e.test_whole_loop import RECIPE, start_run, wait_for_iteration, write_folders

pytestmark = pytest.mark.timeout(900)

# Long enough to be killed several times in the middle; a checkpoint every half second.
LONG = {
    **RECIPE,
    "teacher": {
        "training": {"steps": 1500, "batch_size": 18, "evaluate_every_steps": 500, "ema_decay": 0.9, "checkpoint_every_seconds": 0.5}
    },
}


def children_running(service: Service, module: str) -> list[psutil.Process]:
    """This service's processes that run `python -m module`."""
    return [process for process in everything(service)[1:] if words_of(process)[1:3] == ["-m", module]]


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing when it has just died."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def everything(service: Service) -> list[psutil.Process]:
    """`up` and whatever it started."""
    top = psutil.Process(service.processes.running["up"].pid)
    return [top, *top.children(recursive=True)]


def training_step(service: Service, run_id: str) -> int:
    jobs = service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"]
    progress = jobs[0]["progress"] if jobs else None
    return int((progress or {}).get("done") or 0) if jobs and jobs[0]["status"] == "running" else 0


def wait_for_progress(service: Service, run_id: str, *, beyond: int, seconds: float = 90) -> int:
    return int(
        wait_until(lambda: (step := training_step(service, run_id)) > beyond and step, seconds=seconds, what=f"a step beyond {beyond}")
    )


def events_of_training(service: Service, run_id: str) -> list[dict[str, Any]]:
    """Everything that its one training job told, oldest first."""
    [job] = service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"]
    found: list[dict[str, Any]] = []
    while page := service.get(f"/api/v1/jobs/{job['id']}/events", after=found[-1]["number"] if found else 0, limit=1000)["items"]:
        found += page
    return found


def wait_for_checkpoint(service: Service, run_id: str, *, attempt: int) -> int:
    """The step of a checkpoint that the attempt, counted from 1, wrote: what a kill must not lose."""

    def written() -> int | None:
        steps = steps_of_attempts(service, run_id, "checkpoint")
        return steps[-1][-1] if len(steps) >= attempt and steps[-1] else None

    return int(wait_until(written, seconds=90, what=f"a checkpoint of attempt {attempt}"))


def steps_of_attempts(service: Service, run_id: str, kind: str) -> list[list[int]]:
    """Steps in the events of one kind, a list for each attempt."""
    attempts: list[list[int]] = []
    for event in events_of_training(service, run_id):
        if event["kind"] == "started":
            attempts.append([])
        elif event["kind"] == kind and "step" in event["data"]:
            attempts[-1].append(int(event["data"]["step"]))
    return attempts


def check_no_attempt_began_anew(service: Service, run_id: str, checkpoints: list[int]) -> None:
    """The first word of each attempt after a kill is about a step above the checkpoint known before that kill."""
    later = steps_of_attempts(service, run_id, "metric")[1:]
    assert len(later) == len(checkpoints)
    assert all(steps[0] > checkpoint > 0 for steps, checkpoint in zip(later, checkpoints, strict=True)), (later, checkpoints)


def weights_digest(service: Service, run_id: str) -> str:
    generation_id = wait_for_iteration(service, run_id, 0, seconds=200)["generation_id"]
    return str(service.get(f"/api/v1/generations/{generation_id}")["digest"])


def test_killed_child_supervisor_and_everything_end_with_the_undisturbed_runs_bits(tmp_path: Path):
    folders = write_folders(tmp_path / "images")
    (tmp_path / "calm").mkdir()
    (tmp_path / "stormy").mkdir()
    with embedded(tmp_path / "calm", roots=tmp_path / "images") as calm:
        undisturbed = weights_digest(calm, start_run(calm, folders, iterations="manual", recipe=LONG)["id"])

    stormy = start_embedded(tmp_path / "stormy", roots=tmp_path / "images")
    try:
        run_id = start_run(stormy, folders, iterations="manual", recipe=LONG)["id"]

        checkpoints = [wait_for_checkpoint(stormy, run_id, attempt=1)]
        step = wait_for_progress(stormy, run_id, beyond=0)
        kill_all(children_running(stormy, "workers.attempt"))

        step = wait_for_progress(stormy, run_id, beyond=step)
        checkpoints.append(wait_for_checkpoint(stormy, run_id, attempt=len(checkpoints) + 1))
        kill_all(children_running(stormy, "workers"))

        step = wait_for_progress(stormy, run_id, beyond=step)
        kill_all(children_running(stormy, "server"))
        stormy.wait_ready()
        wait_for_progress(stormy, run_id, beyond=step)
        assert attempts_of(stormy, run_id) == len(checkpoints) + 1, "training does not notice the API"

        checkpoints.append(wait_for_checkpoint(stormy, run_id, attempt=len(checkpoints) + 1))
        kill_all(everything(stormy))
        stormy.processes.kill("up")
        went_on = restart(stormy, tmp_path)
        wait_until(
            lambda: attempts_of(went_on, run_id) > len(checkpoints), seconds=10, what="a new attempt within 10 s of the first answer"
        )
        stormy = went_on

        assert weights_digest(stormy, run_id) == undisturbed
        check_no_attempt_began_anew(stormy, run_id, checkpoints)
        stormy.verify()
    finally:
        stormy.close()


def kill_all(processes: list[psutil.Process]) -> None:
    assert processes, "nothing to kill"
    for process in processes:
        # A child dies with its parent and may be gone before its turn.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def attempts_of(service: Service, run_id: str) -> int:
    return len(steps_of_attempts(service, run_id, "metric"))


def restart(service: Service, tmp_path: Path) -> Service:
    service.client.close()
    return start_embedded(tmp_path / "stormy", roots=tmp_path / "images")


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_while_writing_a_checkpoint_loses_nothing(tmp_path: Path):
    """The attempt's folder is a file system of 24 MB that is filled up in the middle, then freed."""
    import subprocess

    folders = write_folders(tmp_path / "images")
    jobs = tmp_path / "service" / "data" / "jobs"
    jobs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(jobs)], check=True)
    try:
        environment: dict[str, Any] = {"NOISY_STUDENT_RETRY_BACKOFF_SECONDS": "3"}
        with embedded(tmp_path / "service", roots=tmp_path / "images", **environment) as service:
            run_id = start_run(service, folders, iterations="manual", recipe=LONG)["id"]
            wait_for_progress(service, run_id, beyond=0)
            filler = jobs / "filler"
            with filler.open("wb") as file:
                try:
                    while True:
                        file.write(b"\0" * 65536)
                        file.flush()
                except OSError:
                    pass

            def failed_for_space() -> bool:
                job = service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"][0]
                return bool(job["error"]) and job["error"]["code"] == "storage.full"

            wait_until(failed_for_space, seconds=60, what="the attempt saying that the disk is full")
            filler.unlink()

            assert weights_digest(service, run_id)
            service.verify()
    finally:
        subprocess.run(["umount", "-l", str(jobs)], check=False)
