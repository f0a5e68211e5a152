"""SIGKILL in the middle of an epoch, of the child, the supervisor and everything: the run goes on and ends with the same bits."""

from __future__ import annotations

import os
import signal
import time
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
    top = psutil.Process(service.processes.running["up"].pid)
    return [process for process in top.children(recursive=True) if module in " ".join(process.cmdline())]


def training_step(service: Service, run_id: str) -> int:
    jobs = service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"]
    progress = jobs[0]["progress"] if jobs else None
    return int((progress or {}).get("done") or 0) if jobs and jobs[0]["status"] == "running" else 0


def wait_for_progress(service: Service, run_id: str, *, beyond: int, seconds: float = 90) -> int:
    return int(
        wait_until(lambda: (step := training_step(service, run_id)) > beyond and step, seconds=seconds, what=f"a step beyond {beyond}")
    )


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

        step = wait_for_progress(stormy, run_id, beyond=0)
        kill_all(children_running(stormy, "workers.attempt"))

        step = wait_for_progress(stormy, run_id, beyond=step)
        kill_all([process for process in children_running(stormy, "workers") if "workers.attempt" not in " ".join(process.cmdline())])

        step = wait_for_progress(stormy, run_id, beyond=step)
        stormy.processes.kill("up")
        went_on = restart(stormy, tmp_path)
        begun = time.monotonic()
        wait_until(lambda: running_attempt(went_on, run_id), seconds=10, what="the run going on within 10 s")
        assert time.monotonic() - begun < 10
        stormy = went_on

        assert weights_digest(stormy, run_id) == undisturbed
        stormy.verify()
    finally:
        stormy.close()


def kill_all(processes: list[psutil.Process]) -> None:
    assert processes, "nothing to kill"
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def running_attempt(service: Service, run_id: str) -> bool:
    return any(job["status"] == "running" for job in service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"])


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
