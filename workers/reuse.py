"""Taking over labels that the same network made of the same images before, instead of labeling them again."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from core.db.reuse import SHARD, Labeled, ShardKeys, list_same_shards, list_similar_shards, shard_keys
from core.db.session import Database
from core.db.tables import Job, Run
from core.errors import StorageError
from core.logs import get_log
from core.storage import Storage, storage_errors
from ml.config import RuntimeConfig
from ml.errors import MlError
from ml.runtimes import cpu_facts, resolve_on_cpu
from ml.validation import build, to_dict
from workers.announcement import find_devices

_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow")

UNREADABLE = (LookupError, TypeError, ValueError, MlError)
"""What a job's input raises that another version wrote. It is labeled then, and the attempt says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Found:
    """Shards that a job may take over, and the runtime under which they were made."""

    shards: list[Labeled]
    runtime: dict[str, Any]
    is_same: bool
    """Their bytes are those that labeling would make; else only their rows can tell."""


class Reuse:
    """What a worker knows of its own host: which runtime an open one comes to there."""

    def __init__(self, database: Database, *, capabilities: tuple[str, ...]) -> None:
        self._database = database
        self._capabilities = capabilities
        self._resolved: dict[str, dict[str, Any]] = {}

    def find(self, job: Job) -> Found | None:
        """Shards with the bytes that labeling would make, else some that may have; None without any, or when nobody knows what it makes."""
        if job.kind != "label" or not job.input.get("reuse", True):
            return None
        try:
            return self._find(job)
        except UNREADABLE as error:
            get_log().warning("labels.not_reused", job_id=job.id, error=f"{type(error).__name__}: {error}")
            return None

    def _find(self, job: Job) -> Found | None:
        with self._database.reading() as session:
            runtime = self.resolve(asked_runtime(session, job))
            keys = None if runtime is None else shard_keys(session, job.input, runtime=runtime, host=host_facts(runtime["device"]))
            if runtime is None or keys is None:
                return None
            same = list_same_shards(session, keys)
            shards = same or list_similar_shards(session, keys)
        return Found(shards, runtime, is_same=bool(same)) if shards else None

    def resolve(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The runtime that an attempt here would report; None before the first attempt on an accelerator has told what `auto` is there."""
        runtime = build(RuntimeConfig, asked)
        if runtime.device == "cpu" or (runtime.device == "auto" and "cuda" not in self._capabilities):
            return to_dict(resolve_on_cpu(runtime))
        if runtime.device == "cuda" and runtime.precision != "auto" and runtime.num_threads > 0:
            return to_dict(runtime)
        return self._resolved.get(json.dumps(asked, sort_keys=True))

    def note(self, asked: dict[str, Any], resolved: dict[str, Any] | None) -> None:
        """An attempt of this worker was asked for one runtime and came to the other."""
        if resolved is not None:
            self._resolved[json.dumps(asked, sort_keys=True)] = resolved


def asked_runtime(session: Session, job: Job) -> dict[str, Any]:
    """What the run recorded at its first job, else what the job says."""
    run = None if job.run_id is None else session.get(Run, job.run_id, populate_existing=True)
    recorded: dict[str, Any] = (run and run.runtime) or job.input["runtime"]
    return recorded


def keys_of_result(session: Session, job: Job, made: dict[str, Any]) -> ShardKeys | None:
    """The keys of a shard that was just labeled; None for one that another attempt would not make alike.

    Images that were not there, or not any more what the manifest says, may be back; half the micro-batch is a departure. What an attempt
    found in its folder may have been made on another host; what was taken over by its exact key was not.
    """
    found_there = made.get("skipped") and "reused_from" not in made
    if found_there or made.get("num_changed") != 0 or made.get("halved") or made.get("runtime") is None:
        return None
    try:
        return shard_keys(session, job.input, runtime=made["runtime"], host=host_facts(made["runtime"]["device"]))
    except UNREADABLE:
        # Labeled with defaults that its input does not name; nobody looks for it under these.
        return None


def keep(storage: Storage, found: Found) -> tuple[Labeled, dict[str, dict[str, Any]]] | None:
    """Read and compare a shard, and keep it anew, so that no sweep takes it before it is named; None when no shard is whole."""
    for shard in found.shards:
        try:
            return shard, {SHARD: storage.put(storage.fetch(shard.digest, verify=True))}
        except StorageError as error:
            get_log().warning("labels.not_reused", made_by=shard.job_id, error=error.message)
    return None


def lay_out(storage: Storage, found: Found, directory: Path, attempt: int, abandoned: threading.Event) -> None:
    """Put a shard that may be the one into the job's folder: the attempt finds it, compares its rows, and leaves it or writes another."""
    target = directory / SHARD
    for shard in found.shards:
        if target.exists():
            return
        try:
            path = storage.fetch(shard.digest, verify=True)
            with storage_errors(f"bringing {SHARD}"):
                directory.mkdir(parents=True, exist_ok=True)
                aside = directory / f".incoming-{attempt}-{SHARD}"
                shutil.copyfile(path, aside)
                if abandoned.is_set():
                    # The next attempt may have a shard of its own there.
                    aside.unlink()
                    return
                aside.replace(target)
        except StorageError as error:
            get_log().warning("labels.not_reused", made_by=shard.job_id, error=error.message)


@cache
def host_facts(device: str) -> dict[str, Any]:
    """What the bits of a network's answers depend on beside its runtime: the processor, the accelerators, the libraries."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    accelerators = [found["name"] for found in find_devices()] if device == "cuda" else []
    return {"processor": cpu_facts()["model"], "accelerators": accelerators, "versions": versions}
