"""Hosts that share a database and a bucket, and no folder: a training outlives the loss of the host that ran it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from core.db.api_keys import create_api_key
from core.db.files import list_files
from core.db.schema import migrate
from core.db.session import Database
from core.lifecycle import SCOPES
from core.settings import Settings
from tests.builders_services import S3Server
from tests.e2e.processes import Processes, Service, embedded, free_port, wait_until
from tests.e2e.test_kills import check_no_attempt_began_anew, wait_for_checkpoint, weights_digest
from tests.e2e.test_whole_loop import RECIPE, start_run, write_folders

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

# Long enough to be stopped in the middle; a checkpoint every half second.
LONG = {
    **RECIPE,
    "teacher": {
        "training": {"steps": 500, "batch_size": 18, "evaluate_every_steps": 100, "ema_decay": 0.9, "checkpoint_every_seconds": 0.5}
    },
}


def start_worker(service: Service, name: str, data_directory: Path) -> None:
    """A worker on a host of its own, as far as files are concerned."""
    service.processes.start(name, "env", f"NOISY_STUDENT_DATA_DIRECTORY={data_directory}", sys.executable, "-m", "workers")


def test_a_training_whose_host_is_lost_goes_on_elsewhere_and_ends_with_the_undisturbed_runs_bits(
    tmp_path: Path, postgresql_url: str, s3_server: S3Server, s3_url: str
):
    folders = write_folders(tmp_path / "images")
    (tmp_path / "calm").mkdir()
    with embedded(tmp_path / "calm", roots=tmp_path / "images") as calm:
        undisturbed = weights_digest(calm, start_run(calm, folders, iterations="manual", recipe=LONG)["id"])
    database = Database(Settings(database_url=postgresql_url).resolved_database_url)
    migrate(database)
    with database.transaction() as session:
        _, secret = create_api_key(session, name="test", scopes=list(SCOPES))
    environment = {
        "DATA_DIRECTORY": str(tmp_path / "api"),
        "DATABASE_URL": postgresql_url,
        "STORAGE_URL": s3_url,
        "S3_ENDPOINT_URL": s3_server.url,
        "DATASET_ROOTS": str(tmp_path / "images"),
        "PORT": str(free_port()),
        "LEASE_SECONDS": "6",
        "POLL_SECONDS": "0.3",
    }
    processes = Processes(tmp_path, {f"NOISY_STUDENT_{name}": value for name, value in environment.items()})
    service = Service(processes, port=int(environment["PORT"]), data_directory=tmp_path / "api")
    service.use_key(secret)
    try:
        processes.start("api", sys.executable, "-m", "server")
        start_worker(service, "first", tmp_path / "first")
        service.wait_ready()
        run_id = start_run(service, folders, iterations="manual", recipe=LONG)["id"]
        wait_for_checkpoint(service, run_id, attempt=1)
        [job] = service.get("/api/v1/jobs", run_id=run_id, kind="train")["items"]

        def is_kept() -> bool:
            with database.reading() as session:
                return any(row.name == "checkpoint-1/last.ckpt" for row in list_files(session, job["id"]))

        wait_until(is_kept, seconds=60, what="a checkpoint in the bucket")
        processes.kill("first")
        shutil.rmtree(tmp_path / "first")
        start_worker(service, "second", tmp_path / "second")

        assert weights_digest(service, run_id) == undisturbed
        check_no_attempt_began_anew(service, run_id, [1])
        assert "checkpoint.restored" in processes.log("second")
        service.verify()
    finally:
        service.close()
        database.close()
