"""A rolling upgrade as docs/operations.md tells it, with two trees of code: the newer one has a migration, a column and a protocol more."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from core.db.api_keys import create_api_key
from core.db.schema import migrate, newest_revision
from core.db.session import Database
from core.db.tables import Job
from core.lifecycle import SCOPES
from core.settings import Settings
from core.storage import LocalStorage
from core.version import PROTOCOL, VERSION
from deploy.compose_file import read_services
from deploy.loopback import BIN, PUBLIC, Loopback
from tests.e2e.conftest import Undisturbed, wait_for_run
from tests.e2e.processes import Processes, Service, wait_until
from tests.e2e.test_fleet import outcome_of
from tests.e2e.test_kills import wait_for_checkpoint
from tests.e2e.test_whole_loop import start_run
from tests.faults.load import RED
from tests.server.builders_service import register_network, write_generation_files

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("core", "ml", "server", "workers", "cli", "migrations")
NEWER_VERSION = "99.0.0"
EXPAND = '''"""One release on: jobs and workers have a note.

Expand first, contract in a later release.
"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("workers", "jobs"):
        op.add_column(table, sa.Column("note", sa.Text(), nullable=False, server_default="none"))


def downgrade() -> None:
    for table in ("jobs", "workers"):
        op.drop_column(table, "note")
'''


def write_newer_version(tree: Path) -> str:
    """A copy of the code that is one release on, and reads what its migration adds; the revision that it needs."""
    for room in ROOMS:
        shutil.copytree(REPOSITORY / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    before = newest_revision()
    number = int(before[:4]) + 1
    revision = f"{number:04}_serves_{before[:4]}"
    (tree / f"migrations/versions/v{number:04}_notes.py").write_text(EXPAND.format(revision=revision, before=before), encoding="utf-8")
    note = '    note: Mapped[str] = mapped_column(sa.Text, server_default="none")\n'
    replace(tree / "core/db/tables.py", "    capability: Mapped[str]\n    priority:", f"{note}    capability: Mapped[str]\n    priority:")
    replace(tree / "core/db/tables.py", "    boot_id: Mapped[str]\n", f"{note}    boot_id: Mapped[str]\n")
    replace(tree / "core/version.py", f'VERSION = "{VERSION}"', f'VERSION = "{NEWER_VERSION}"')
    replace(tree / "core/version.py", f"PROTOCOL = {PROTOCOL}\n", f"PROTOCOL = {PROTOCOL + 1}\n")
    return revision


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@dataclass
class Client:
    """Somebody who asks the one address all the time, and counts what failed."""

    service: Service
    run_id: str
    images: Path
    answers: int = 0
    by_version: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)

    @contextmanager
    def asking(self) -> Iterator[None]:
        over = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(over, kind)) for kind in (self._read, self._predict, self._write)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask(self, over: threading.Event, ask: Any) -> None:
        number = 0
        while not over.wait(3.0 if ask == self._write else 0.1):
            number += 1
            try:
                response: httpx.Response = ask(number)
            except httpx.TransportError as error:
                self.failures.append(f"{ask.__name__} {number}: {error!r}")
                continue
            self.answers += 1
            if response.status_code not in (200, 202):
                self.failures.append(f"{ask.__name__} {number}: {response.status_code} {response.text[:300]}")

    def _read(self, number: int) -> httpx.Response:
        if number % 2:
            return self.service.client.get(f"/api/v1/runs/{self.run_id}")
        response = self.service.client.get("/livez")
        version = response.json()["version"]
        self.by_version[version] = self.by_version.get(version, 0) + 1
        return response

    def _predict(self, _number: int) -> httpx.Response:
        return self.service.client.post("/predict", content=RED, headers={"Content-Type": "application/octet-stream"})

    def _write(self, number: int) -> httpx.Response:
        body = {"name": f"meanwhile-{number}", "kind": "evaluation", "source": {"folder": str(self.images)}}
        response = self.service.client.post("/api/v1/datasets", json=body, headers={"Idempotency-Key": body["name"]})
        if response.status_code == 202:
            self.registered.append(response.json()["id"])
        return response


@dataclass
class Roll:
    """Two versions of the service beside each other, behind one proxy."""

    processes: Processes
    place: Loopback
    trees: dict[str, Path]

    def start(self, name: str, *command: str) -> None:
        """`name` ends with the version, `old` or `new`."""
        tree = self.trees[name.rpartition("-")[2]]
        port = f"NOISY_STUDENT_PORT={self.place.port(NAMES[name])}" if name in NAMES else "NOISY_STUDENT_PORT=0"
        self.processes.start(name, "env", f"--chdir={tree}", f"PYTHONPATH={tree}", port, *command)

    def start_replicas(self, version: str) -> None:
        self.start(f"api-{version}", sys.executable, "-m", "server")
        self.start(f"predictor-{version}", sys.executable, "-m", "server", "--predictor")

    def start_worker(self, name: str) -> None:
        self.start(name, str(BIN / "celery"), "-A", "workers.app", "worker", "-Q", "cpu", "-n", f"{name}@%h", "--loglevel", "INFO")

    def start_proxy(self) -> None:
        """The Compose file's."""
        started = self.place.start(read_services({"POSTGRES_PASSWORD": "-", "DATASETS": "-"})[PUBLIC], PUBLIC)
        self.processes.start("proxy", *started.command)

    def readiness(self, name: str) -> tuple[int, dict[str, str]]:
        """Past the proxy; (0, {}) while it does not listen."""
        with suppress(httpx.TransportError):
            answer = httpx.get(f"http://127.0.0.1:{self.place.port(NAMES[name])}/readyz", timeout=30, trust_env=False)
            return answer.status_code, answer.json()["checks"]
        return 0, {}

    def wait_until_ready(self, *names: str) -> None:
        for name in names:
            wait_until(lambda one=name: self.readiness(one)[0] == 200, seconds=90, what=f"readiness of {name}")

    def migrate(self) -> None:
        """With the newer version; returns when it has ended well."""
        self.start("migrate-new", sys.executable, "-m", "cli.main", "migrate")
        status = self.processes.running.pop("migrate-new").wait(120)
        assert status == 0, self.processes.log("migrate-new")


NAMES = {"api-old": "api-1", "predictor-old": "predictor-1", "api-new": "api-2", "predictor-new": "predictor-2"}
"""As the proxy calls them."""


@contextmanager
def rolling(directory: Path, undisturbed: Undisturbed, database_url: str, redis_url: str) -> Iterator[tuple[Roll, Service, Database]]:
    """Everything of the old version, with a generation that answers."""
    place = Loopback(directory, {"api": 2, "predictor": 2}, shares_data=True)
    environment = {
        "DATA_DIRECTORY": str(directory / "data"),
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "DATASET_ROOTS": str(undisturbed.root),
        "PREDICT": "false",
    }
    database = Database(Settings(database_url=database_url).resolved_database_url)
    migrate(database)
    with database.transaction() as session:
        _, secret = create_api_key(session, name="test", scopes=list(SCOPES))
    write_generation_files(directory / "colors", num_correct=90, num_images=100, scale=10, rotate=0, temperature=2, num_outputs=3)
    colors = register_network(database, LocalStorage(directory / "data/objects"), directory / "colors", name="colors")
    processes = Processes(directory, {f"NOISY_STUDENT_{name}": value for name, value in environment.items()})
    roll = Roll(processes, place, {"old": REPOSITORY, "new": directory / "newer"})
    service = Service(processes, port=place.port(PUBLIC), data_directory=directory / "data")
    service.use_key(secret)
    try:
        roll.start_proxy()
        roll.start_replicas("old")
        for name in ("worker-1-old", "worker-2-old"):
            roll.start_worker(name)
        roll.wait_until_ready("api-old", "predictor-old")
        service.wait_ready()
        moved = service.client.put("/api/v1/aliases/production", json={"generation": colors}, headers={"If-None-Match": "*"})
        assert moved.status_code == 200, moved.text
        wait_until(lambda: Client(service, "", directory)._predict(0).status_code == 200, seconds=30, what="the first prediction")
        yield roll, service, database
    finally:
        service.close()
        database.close()


def replace_workers(roll: Roll) -> None:
    """One by one; the one that trains hands over."""
    for name in ("worker-1-old", "worker-2-old"):
        roll.start_worker(name.replace("old", "new"))
        assert roll.processes.terminate(name, seconds=90) == 0, roll.processes.log(name)


def test_a_fleet_is_upgraded_over_a_schema_change_while_a_run_goes_on_and_no_request_fails(
    tmp_path: Path, undisturbed: Undisturbed, postgresql_url: str, redis_url: str
) -> None:
    revision = write_newer_version(tmp_path / "newer")
    with rolling(tmp_path, undisturbed, postgresql_url, redis_url) as (roll, service, database):
        run = start_run(service, undisturbed.folders, iterations=1, recipe=undisturbed.recipe)
        client = Client(service, run["id"], undisturbed.folders["test"])
        with client.asking():
            wait_for_checkpoint(service, run["id"], attempt=1)

            roll.start_replicas("new")
            early = {
                name: wait_until(lambda one=name: self_told(roll, one), seconds=90, what=name) for name in ("api-new", "predictor-new")
            }
            roll.migrate()
            roll.wait_until_ready("api-new", "predictor-new")
            between = {name: roll.readiness(name)[0] for name in NAMES}
            beside = dict(client.by_version)
            wait_until(lambda: NEWER_VERSION in client.by_version, seconds=20, what="an answer of the newer version")
            for name in ("api-old", "predictor-old"):
                assert roll.processes.terminate(name) == 0, roll.processes.log(name)
            [before] = service.get("/api/v1/jobs", run_id=run["id"], status="running")["items"]
            replace_workers(roll)
            wait_for_run(service, run["id"], seconds=400)

        outcome = outcome_of(service)
        ends = {service.finished_job(job_id)["status"] for job_id in client.registered}
        workers = [one for one in service.get("/api/v1/workers")["items"] if one["alive"]]
        with database.reading() as session:
            query = sa.select(Job.step, Job.attempt, Job.lost_attempts, Job.protocol).where(Job.run_id == run["id"]).order_by(Job.id)
            jobs = {step: (attempt, lost, protocol) for step, attempt, lost, protocol in session.execute(query)}
            notes = session.execute(sa.text("SELECT DISTINCT note FROM jobs")).scalars().all()
        verify_with(service, tmp_path / "newer")

    assert {name: status for name, (status, _) in early.items()} == dict.fromkeys(early, 503)
    assert all(f"this version needs {revision}" in checks["database"] for _, checks in early.values())
    assert between == dict.fromkeys(NAMES, 200)
    assert set(beside) <= {VERSION, NEWER_VERSION}
    assert client.failures == []
    assert client.answers > 100
    assert ends == {"succeeded"}
    assert before["kind"] == "train"
    assert {worker["version"] for worker in workers} == {NEWER_VERSION}
    # The teacher was begun by the old version, was handed over for nothing, and what came after it is the newer one's.
    assert jobs["train-teacher"][0] > 1
    assert jobs["train-teacher"][1:] == (0, PROTOCOL)
    assert jobs["train-student"][2] == PROTOCOL + 1
    assert notes == ["none"]
    assert outcome == undisturbed.outcome


def self_told(roll: Roll, name: str) -> tuple[int, dict[str, str]] | None:
    """Its answer about itself, as soon as it speaks of the schema."""
    status, checks = roll.readiness(name)
    return (status, checks) if "schema" in checks.get("database", "") else None


def verify_with(service: Service, tree: Path) -> None:
    """`doctor --verify` of the version that the database has now."""
    processes = Processes(tree, service.processes.environment)
    processes.start("verify", "env", f"--chdir={tree}", f"PYTHONPATH={tree}", sys.executable, "-m", "cli.main", "doctor", "--verify")
    status = processes.running.pop("verify").wait(120)
    assert status == 0, processes.log("verify")
