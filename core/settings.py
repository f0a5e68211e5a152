"""A process's environment: every setting, its variable `NOISY_STUDENT_<NAME>`, and its default."""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from core.errors import SetupError

PREFIX = "NOISY_STUDENT_"
S3 = "s3://"
"""How an address of objects begins."""


class SecretFiles(PydanticBaseSettingsSource):
    """`NOISY_STUDENT_<NAME>_FILE` names a file that holds the value: that is how containers are handed secrets."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002  pydantic-settings' signature
        """The file's content without the white space around it; SetupError when it cannot be read."""
        variable = f"{PREFIX}{field_name.upper()}_FILE"
        path = os.environ.get(variable)
        if not path:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except OSError as error:
            raise SetupError(f"{variable} names {path}, which cannot be read: {error.strerror}") from error

    def __call__(self) -> dict[str, Any]:
        """Every field that has such a file."""
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class Settings(BaseSettings):
    """Read from the environment once, at a process's start. An empty variable counts as none."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", use_attribute_docstrings=True)

    data_directory: Path = Path("noisy-student-data")
    """Where rows (unless `database_url` says otherwise), files and logs live."""
    database_url: str | None = None
    """`postgresql://…`; None keeps an SQLite file in the data directory."""
    storage_url: str | None = None
    """`s3://BUCKET/PREFIX` keeps stored files in a bucket, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or whatever else boto3 finds;
    None keeps them in the data directory, which hosts of a fleet must then share."""
    s3_endpoint_url: str | None = None
    """`https://…` of a store that speaks like S3; None is AWS."""
    s3_region: str | None = None
    """Region of the bucket; None is the one that boto3 finds."""
    cache_max_bytes: Annotated[int, Field(gt=0)] = 50_000_000_000
    """Room for this host's copies of files from the bucket. Those that were used within the last hour stay even beyond it."""
    redis_url: str | None = None
    """`redis://…` of the Celery broker; None is the embedded service, whose worker polls the database."""
    dataset_roots: Annotated[tuple[Path | str, ...], NoDecode] = ()
    """Folders and `s3://BUCKET/PREFIX` below which datasets may lie, separated by `:`; the data directory's `datasets` always counts."""
    dataset_s3_endpoint_url: str | None = None
    """Store of the datasets in S3; None is that of `s3_endpoint_url`."""
    dataset_s3_region: str | None = None
    """Its region; None is `s3_region`."""
    dataset_s3_access_key_id: str | None = None
    """Key that may list and read the datasets' buckets. Attempts are given it; None gives those that need it what botocore finds here."""
    dataset_s3_secret_access_key: str | None = None
    """The key's secret."""
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: int = 8000
    """Port the API listens on."""
    require_keys: bool = True
    """Off is allowed on a loopback address only."""
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a silent worker keeps its job; the heartbeat comes four times as often."""
    poll_seconds: Annotated[float, Field(gt=0)] | None = None
    """How often a worker looks for jobs without being told; None: 1 embedded, 30 with a broker."""
    housekeeping_seconds: Annotated[float, Field(gt=0)] = 0.5
    """How often the holder of the singleton lease relays, sweeps and moves iterations on."""
    grace_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a stopped attempt may take to write its checkpoint before it is killed."""
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """An attempt that reports nothing for this long is taken for hung; must cover the longest silent phase."""
    retry_backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the second attempt; doubles with each further one."""
    max_attempts: Annotated[int, Field(ge=1)] = 4
    """Attempts a job may lose before it fails; an interrupted one costs none."""
    slots: Annotated[int, Field(ge=1)] = 1
    """Attempts a worker runs at a time."""
    worker_name: str | None = None
    """Name shown for this worker; None: host and process id."""
    capabilities: Annotated[tuple[str, ...], NoDecode] = ("cpu",)
    """What this host can do (`cpu`, `cuda`), separated by `,`. Where it is not set, an embedded worker adds `cuda` when it finds an
    NVIDIA driver with a GPU; a Celery worker offers the queues of its `-Q`."""
    consumer_patience_seconds: Annotated[float, Field(gt=0)] = 90.0
    """A hint that lies in the broker for this long while a slot is idle means that Celery's consumer has stopped: the worker ends, so that
    a fresh one takes over. Must cover the longest pause before Celery connects to Redis again, 30 seconds."""
    orphan_grace_seconds: Annotated[float, Field(ge=0)] = 3600.0
    """Age at which a stored file that no row names is removed."""
    keep_shards_days: Annotated[float, Field(ge=0)] | None = None
    """How long the shards of guesses stay after their iteration, or their set of its own, has finished; None: as long as the set. What was
    selected, the report and the lineage stay. Labels that are gone are not taken over by other sets, and made again when needed."""
    keep_items_days: Annotated[float, Field(ge=0)] | None = None
    """Likewise the list of every guess by confidence, which the pages of items are read from; they answer 410 afterwards."""
    keep_checkpoints_days: Annotated[float, Field(ge=0)] = 7.0
    """How long checkpoints and folders of failed and canceled jobs stay; a retry goes on from them, afterwards it begins anew."""
    keep_predictions_days: Annotated[float, Field(ge=0)] | None = None
    """How long the items of batch predictions stay; None: until the prediction is deleted."""
    keep_answers_days: Annotated[float, Field(gt=0)] = 30.0
    """How long an Idempotency-Key gets its first answer again; later it counts as new."""
    keep_workers_days: Annotated[float, Field(ge=1)] = 30.0
    """How long workers that are gone are listed."""
    reuse_labels: bool = True
    """Off: a worker labels every shard itself, also where the same bytes were made before."""
    predict: bool = True
    """Off: this API leaves /predict to predictor replicas (`python -m server --predictor`) and says so."""
    predict_url: str | None = None
    """Where predictor replicas are reached; an API that leaves /predict to them names it."""
    predict_max_bytes: Annotated[int, Field(gt=0)] = 20_000_000
    """Largest body of one /predict request."""
    body_max_bytes: Annotated[int, Field(gt=0)] = 1_000_000
    """Largest body of every other request."""
    predict_queue: Annotated[int, Field(ge=1)] = 64
    """Images that may wait for the predictor; one more is answered 503."""
    predict_threads: Annotated[int, Field(ge=0)] = 0
    """Threads that decode and predict; 0: one more than there are cores, because now and then each waits for the interpreter."""
    predict_deadline_seconds: Annotated[float, Field(gt=0)] = 10.0
    """A request that waited longer is answered 503 instead of late."""
    predict_in_flight: Annotated[int, Field(ge=0)] = 0
    """Requests to /predict that one key may have open at a time, in each process; one more is answered 429. 0: as many as it likes."""
    predict_hung_seconds: Annotated[float, Field(gt=0)] = 60.0
    """An image in work for this long tells that the process hangs: /livez says so, and it ends itself to be started anew."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  pydantic-settings' signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then variables, then the files that variables name."""
        return init_settings, env_settings, SecretFiles(settings_cls)

    @field_validator("dataset_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        # The colon of an address has two slashes behind it.
        parts = re.split(r":(?!//)", value) if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return parts
        return tuple(part if str(part).startswith(S3) else Path(part) for part in parts if part)

    @field_validator("capabilities", mode="before")
    @classmethod
    def _split_capabilities(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @cached_property
    def resolved_database_url(self) -> str:
        """The database to open; `postgresql://` means psycopg 3."""
        if self.database_url is None:
            return f"sqlite:///{self.data_directory.resolve() / 'noisy-student.sqlite3'}"
        for short in ("postgresql://", "postgres://"):
            if self.database_url.startswith(short):
                return "postgresql+psycopg://" + self.database_url.removeprefix(short)
        if not self.database_url.startswith(("postgresql", "sqlite:///")):
            scheme = self.database_url.partition("://")[0][:40]
            raise SetupError(f"NOISY_STUDENT_DATABASE_URL begins with {scheme!r}; it must begin with postgresql:// or sqlite:///")
        return self.database_url

    @property
    def resolved_poll_seconds(self) -> float:
        """How often a worker polls, with the default filled in."""
        return self.poll_seconds if self.poll_seconds is not None else (1.0 if self.redis_url is None else 30.0)

    @property
    def roots(self) -> tuple[Path, ...]:
        """Every folder below which a dataset may lie, resolved."""
        return tuple(path.resolve() for path in (*self.dataset_roots, self.data_directory / "datasets") if isinstance(path, Path))

    @property
    def bucket_roots(self) -> tuple[str, ...]:
        """Every `s3://BUCKET/PREFIX` below which a dataset may lie."""
        return tuple(root.rstrip("/") for root in self.dataset_roots if isinstance(root, str))

    @property
    def dataset_access(self) -> dict[str, str]:
        """How datasets in S3 are read, as the variables that botocore knows, as far as the settings say."""
        named = {
            "AWS_ENDPOINT_URL_S3": self.dataset_s3_endpoint_url or self.s3_endpoint_url,
            "AWS_DEFAULT_REGION": self.dataset_s3_region or self.s3_region,
            "AWS_ACCESS_KEY_ID": self.dataset_s3_access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.dataset_s3_secret_access_key,
        }
        return {name: value for name, value in named.items() if value}

    @property
    def objects_directory(self) -> Path:
        """Stored files, named by digest."""
        return self.data_directory / "objects"

    @property
    def attempts_directory(self) -> Path:
        """Working folders and checkpoints of jobs, one folder a job."""
        return self.data_directory / "jobs"

    @property
    def cache_directory(self) -> Path:
        """Folders made from stored files; may be deleted at any time."""
        return self.data_directory / "cache"

    @property
    def workers_directory(self) -> Path:
        """A small file a worker, by which `python -m workers.health` tells that it is alive."""
        return self.data_directory / "workers"

    @property
    def key_file(self) -> Path:
        """The first admin key, readable by its owner only; the CLI finds it here by itself."""
        return self.data_directory / "admin.key"

    @property
    def restore_marker(self) -> Path:
        """There while a restore is not finished; nothing starts over this directory then."""
        return self.data_directory / "restore-unfinished"

    @property
    def service_file(self) -> Path:
        """Address and process of the running `up`, as JSON; the CLI finds it here by itself."""
        return self.data_directory / "service.json"
