"""The stage of a chaos run: a whole service as processes, with a proxy before each server for each of them."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
import sqlalchemy.exc

from core.db.api_keys import create_api_key
from core.db.schema import migrate
from core.db.session import Database
from core.db.tables import Job, SingletonLease
from core.lifecycle import SCOPES
from core.settings import Settings
from core.storage import LocalStorage, S3Storage, Storage
from core.storage.cache import ObjectCache
from core.storage.making import read_place
from tests.builders_services import S3Server, free_port, wait_until
from tests.faults.members import Member, Members, command_of
from tests.faults.proxy import Proxy, connect_to
from tests.faults.s3_proxy import S3Proxy
from tests.faults.servers import Postgresql, Redis
from tests.server.builders_service import COLORS, register_network, write_generation_files

LEASE_SECONDS = 3.0
QUICK = {
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "POLL_SECONDS": "0.5",
    "HOUSEKEEPING_SECONDS": "0.2",
    "GRACE_SECONDS": "4",
    "STALL_SECONDS": "90",
    # Many faults may hit one job; how many attempts it has is not what is tried here.
    "RETRY_BACKOFF_SECONDS": "0",
    "MAX_ATTEMPTS": "500",
    "PREDICT_QUEUE": "8",
}
DISK_BYTES = 400 << 20
AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)


class Stage:
    """Opened by `set_up`."""

    def __init__(self, directory: Path, kind: str, storage: str, *, seed: int, num_workers: int) -> None:
        self.directory = directory
        self.kind = kind
        self.storage_kind = storage
        self.seed = seed
        self.is_sqlite = kind == "sqlite"
        self.data = directory / "data"
        self.images = directory / "images"
        self.storage: Storage = LocalStorage(self.data / "objects")
        self.bucket: S3Server | None = None
        self.bucket_proxy: S3Proxy | None = None
        self.bucket_url = ""
        self.members = Members()
        self.proxies: list[Proxy] = []
        self.postgresql = None if self.is_sqlite else Postgresql()
        self.redis = None if self.is_sqlite else Redis(directory)
        self.has_disk_of_its_own = False
        self.port = free_port()
        url = f"sqlite:///{self.data.resolve() / 'noisy-student.sqlite3'}" if self.postgresql is None else self.postgresql.url
        self.database_url = url
        self.settings = Settings(data_directory=self.data, database_url=url)
        self.secret = ""
        self._num_workers = num_workers
        self.over = threading.Event()
        self.database: Database

    def open(self) -> None:
        """Disk, rows, key and processes; returns when the API is ready."""
        self.data.mkdir()
        self.has_disk_of_its_own = _mount(self.data)
        self.images.mkdir()
        if self.storage_kind == "bucket":
            self.storage = self._open_bucket()
        self.database = Database(self.settings.resolved_database_url)
        migrate(self.database)
        with self.database.transaction() as session:
            _, self.secret = create_api_key(session, name="chaos", scopes=list(SCOPES))

    def _open_bucket(self) -> Storage:
        """The runner asks the store itself, past the proxy, and keeps copies of its own."""
        buckets = self.directory / "buckets"
        buckets.mkdir()
        self.bucket = S3Server(buckets)
        self.bucket.start()
        self.bucket_url = self.bucket.make_bucket("chaos")
        self.bucket_proxy = S3Proxy(self.bucket.port, seed=self.seed)
        os.environ |= self._credentials()
        settings = Settings(storage_url=self.bucket_url, s3_endpoint_url=self.bucket.url)
        cache = ObjectCache(self.directory / "copies", max_bytes=1 << 30)
        return S3Storage(read_place(settings), cache, renew_seconds=self.settings.orphan_grace_seconds)

    def _credentials(self) -> dict[str, str]:
        nowhere = str(self.directory / "none")
        named = {"ACCESS_KEY_ID": S3Server.access_key, "SECRET_ACCESS_KEY": S3Server.secret_key, "EC2_METADATA_DISABLED": "true"}
        return {f"AWS_{name}": value for name, value in {**named, "CONFIG_FILE": nowhere, "SHARED_CREDENTIALS_FILE": nowhere}.items()}

    def path_of(self, digest: str) -> Path:
        """The file that the service will be given when it asks its storage for that content."""
        return self.storage.fetch(digest) if self.bucket is None else self.bucket.path_of(self.bucket_url, digest)

    def start(self) -> None:
        """The processes; returns when the API is ready."""
        self.members.add(self._member("api", *command_of("server")))
        for number in range(1, self._num_workers + 1):
            name = f"worker-{number}"
            celery = command_of("celery", "-A", "workers.app", "worker", "-Q", "cpu", "-n", f"{name}@%h", "--loglevel", "WARNING")
            self.members.add(self._member(name, *(command_of("workers") if self.is_sqlite else celery)))
        for member in self.members.all.values():
            member.start()
        self.members.start()
        wait_until(self.is_ready, seconds=60, what="the API's start")

    def close(self) -> None:
        """Stop everything, give everything back."""
        self.over.set()
        self.members.stop()
        for proxy in self.proxies:
            proxy.close()
        if hasattr(self, "database"):
            self.database.close()
        for server in (self.postgresql, self.redis, self.bucket_proxy):
            if server is not None:
                server.close()
        if self.bucket is not None:
            self.bucket.stop()
        if self.has_disk_of_its_own:
            subprocess.run(["umount", "-l", str(self.data)], check=False, capture_output=True)

    def _member(self, name: str, *command: str) -> Member:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("NOISY_STUDENT_", "PG"))}
        values = {**QUICK, "DATA_DIRECTORY": str(self.data), "PORT": str(self.port), "DATASET_ROOTS": str(self.images)}
        database_proxy = broker_proxy = None
        if self.postgresql is not None and self.redis is not None:
            database_proxy = self._proxy(connect_to(self.postgresql.socket))
            broker_proxy = self._proxy(connect_to(("127.0.0.1", self.redis.port)))
            values["DATABASE_URL"] = f"postgresql://postgres@127.0.0.1:{database_proxy.port}/rows"
            values["REDIS_URL"] = f"redis://127.0.0.1:{broker_proxy.port}/0"
            values["POLL_SECONDS"] = "3"
        if self.bucket_proxy is not None:
            values |= {"STORAGE_URL": self.bucket_url, "S3_ENDPOINT_URL": self.bucket_proxy.url}
            kept |= self._credentials()
        settings = {f"NOISY_STUDENT_{key}": value for key, value in values.items()}
        environment = {**kept, **settings, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CHAOS_SEED": str(self.seed)}
        return Member(name, command, environment, self.directory, database_proxy, broker_proxy)

    def _proxy(self, connect: Any) -> Proxy:
        proxy = Proxy(connect)
        self.proxies.append(proxy)
        return proxy

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.secret}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, trust_env=False, **{"timeout": 15, **options})

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError), self.client(timeout=5) as client:
            return client.get("/readyz").status_code == 200
        return False

    def running(self) -> dict[str, Job]:
        """Jobs that some worker holds, by id; empty also while the database is away."""
        with suppress(*AWAY), self.database.reading() as session:
            return {job.id: job for job in session.scalars(sa.select(Job).where(Job.status == "running"))}
        return {}

    def find_jobs(self, ids: list[str]) -> dict[str, Job] | None:
        """By id; None while the database is away."""
        with suppress(*AWAY), self.database.reading() as session:
            return {job.id: job for job in session.scalars(sa.select(Job).where(Job.id.in_(ids)))}
        return None

    def count_open(self) -> int | None:
        """Jobs that wait or run; None while the database is away."""
        with suppress(*AWAY), self.database.reading() as session:
            open_jobs = sa.select(sa.func.count()).select_from(Job).where(Job.status.in_(("queued", "running")))
            return session.scalar(open_jobs) or 0
        return None

    def housekeeper(self) -> Member | None:
        """Whoever holds the singleton lease."""
        with suppress(*AWAY), self.database.reading() as session:
            lease = session.get(SingletonLease, "housekeeping")
            if lease is not None:
                return self.members.with_pid(int(lease.holder.split(":")[-2]))
        return None

    def add_generation(self, name: str, *, rotate: int = 0, num_outputs: int = 3) -> str:
        """An imported color network, with the history that a job of its own would have left; its id."""
        folder = self.directory / name
        write_generation_files(folder, num_correct=90, num_images=100, scale=10, rotate=rotate, temperature=2, num_outputs=num_outputs)
        return self.register(folder, name=name, class_names=list(COLORS))

    def register(self, folder: Path, *, name: str, class_names: list[str]) -> str:
        """A folder of an exported network as a generation."""
        return register_network(self.database, self.storage, folder, name=name, class_names=class_names)

    def fill_disk(self) -> None:
        """No room for anything new, at once and for everybody."""
        if self.has_disk_of_its_own:
            wait_until(self._shrink, seconds=10, what="a file system without room")
        else:
            for member in self.members.all.values():
                member.wish(disk_full=True)

    def _shrink(self) -> bool:
        """To what is used now; refused when more is used a moment later."""
        used = os.statvfs(self.data)
        return self._resize((used.f_blocks - used.f_bfree) * used.f_frsize)

    def free_disk(self) -> None:
        if self.has_disk_of_its_own:
            assert self._resize(DISK_BYTES)
        else:
            for member in self.members.all.values():
                member.wish()

    def _resize(self, num_bytes: int) -> bool:
        command = ["mount", "-o", f"remount,size={num_bytes}", str(self.data)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _mount(directory: Path) -> bool:
    """A small file system of its own, where the system lets us."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def set_up(kind: str, storage: str = "folder", *, seed: int, num_workers: int) -> Iterator[Stage]:
    """A stage with its rows and files, whose processes are not started yet."""
    with tempfile.TemporaryDirectory(prefix="nss-chaos-", ignore_cleanup_errors=True) as directory:
        stage = Stage(Path(directory), kind, storage, seed=seed, num_workers=num_workers)
        try:
            stage.open()
            yield stage
        finally:
            stage.close()


def chance(seed: int, *words: object) -> random.Random:
    """A generator of its own for each purpose, so that one draw more here changes nothing there."""
    return random.Random(" ".join(str(word) for word in (seed, *words)))
