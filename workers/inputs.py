"""From a job's row to what its attempt needs: ids become paths of local files, and the run's recipe and runtime come along.

Rows are read in one short session, which only notes what files are needed; files are brought afterwards, however long that takes.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from core.db.datasets import get_version, source_of
from core.db.files import list_files
from core.db.generations import get_generation
from core.db.jobs import has_halved
from core.db.pseudo_labels import get_set, list_shards
from core.db.runs import get_run
from core.db.session import Database
from core.db.tables import DatasetVersion, Generation, Iteration, Job, PseudoLabelSet, Run
from core.errors import NotFound, NotReady
from core.settings import S3, Settings
from core.storage import Storage, materialize
from core.version import VERSION
from ml.config import RuntimeConfig
from ml.validation import to_dict
from workers.checkpoints import restore_checkpoint
from workers.child import find_access
from workers.folders import drop_leftovers

_NOT_SELECTION = ("evaluation_version_ids", "keep_keys_of_set_id")
"""What the set's row keeps beside the SelectionConfig."""


@dataclass(frozen=True, slots=True)
class _File:
    """Stands for the path of a stored file until that is brought."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Folder:
    """Stands for the path of a folder of stored files."""

    name: str
    digests: Mapping[str, str]


class Inputs:
    """Resolves jobs on this host."""

    def __init__(self, database: Database, storage: Storage, settings: Settings, *, capabilities: tuple[str, ...]) -> None:
        self._database = database
        self._storage = storage
        self._settings = settings
        self._capabilities = capabilities

    def directory(self, job_id: str) -> Path:
        """The job's own folder on this host; an attempt finds there what the one before left."""
        return self._settings.attempts_directory.resolve() / job_id

    def access(self, job: Job) -> dict[str, str]:
        """Variables for the attempt's process: what reading its images takes, and nothing when they lie in folders."""
        with self._database.reading() as session:
            sources = [job.input] if job.kind == "ingest" else [source_of(session, version_id) for version_id in _looked_at(session, job)]
        return find_access(self._settings) if any(self._lies_in_s3(source, job) for source in sources) else {}

    def _lies_in_s3(self, source: dict[str, Any], job: Job) -> bool:
        if source.get("pack") and job.kind != "ingest":
            return not self._storage.is_local
        return str(source.get("path", "")).startswith(S3)

    def request(self, job: Job, abandoned: threading.Event) -> dict[str, Any]:
        """The line that tells a child what to do. Raises NotFound or NotReady for rows, StorageError for files.

        Takes as long as it takes to bring the files to this host. Whoever does not wait for that any more says so by `abandoned`.
        """
        directory = self.directory(job.id)
        drop_leftovers(directory, job.attempt)
        if job.kind == "train":
            restore_checkpoint(self._database, self._storage, job, directory, abandoned)
        found = self.resolve(job)
        if abandoned.is_set():
            # The attempt's end, which drops them, may have come before them.
            self.drop_files(job)
        return {
            "job_id": job.id,
            "kind": job.kind,
            "attempt": job.attempt,
            "input": found,
            "directory": str(directory),
            "halve_micro_batch": has_halved(job.error),
            "capabilities": list(self._capabilities),
            "stored_at": self._storage.root,
        }

    def resolve(self, job: Job) -> dict[str, Any]:
        """The job's input without ids."""
        with self._database.reading() as session:
            resolve = {
                "ingest": self._ingest,
                "split": self._split,
                "train": self._train,
                "label": self._label,
                "select": self._select,
                "predict": self._predict,
                "import": self._import,
            }[job.kind]
            needed = resolve(session, job)
        found: dict[str, Any] = self._bring(needed, self._own_files(job))
        return found

    def _own_files(self, job: Job) -> Path:
        return self.directory(job.id) / f"inputs-{job.attempt}"

    def drop_files(self, job: Job) -> None:
        """The attempt is over: the storage may take back the room of what was brought for it."""
        shutil.rmtree(self._own_files(job), ignore_errors=True)

    def _bring(self, needed: Any, own: Path) -> Any:
        """The same with paths. What the storage may take back while the attempt runs is linked into the job's own folder."""
        if isinstance(needed, dict):
            return {name: self._bring(value, own) for name, value in needed.items()}
        if isinstance(needed, list):
            return [self._bring(value, own) for value in needed]
        if isinstance(needed, _File) and self._storage.is_local:
            return str(self._storage.fetch(needed.digest).resolve())
        if isinstance(needed, _File):
            return str(materialize(self._storage, {needed.name: needed.digest}, own / needed.digest) / needed.name)
        if isinstance(needed, _Folder):
            kept = self._settings.cache_directory.resolve() / "generations" if self._storage.is_local else own
            return str(materialize(self._storage, needed.digests, kept / needed.name))
        return needed

    def _ingest(self, _session: Session, job: Job) -> dict[str, Any]:
        named = {name: job.input.get(name) for name in ("format", "split", "pack")}
        if "folder" in job.input:
            return named | {"path": job.input["folder"], "kind": job.input["kind"], "format": "folder"}
        return named | {"path": job.input["path"], "kind": job.input["kind"]}

    def _import(self, _session: Session, job: Job) -> dict[str, Any]:
        return {"folder": job.input["folder"], "class_names": job.input.get("class_names")}

    def _split(self, session: Session, job: Job) -> dict[str, Any]:
        manifest = self._manifest(session, job.input["source_version_id"])
        return {"manifest": manifest, "targets": job.input["targets"], "seed": job.input["seed"]}

    def _label(self, session: Session, job: Job) -> dict[str, Any]:
        run = get_run(session, job.run_id) if job.run_id else None
        return {
            "generation": self._generation(session, job.input["generation_id"]),
            "unlabeled": self._manifest(session, job.input["version_id"]),
            # When the first job of a run is a labeling job, its row was written before the runtime was known.
            "runtime": (run and run.runtime) or job.input["runtime"],
            **{name: job.input[name] for name in ("start", "stop", "labeling")},
        }

    def _predict(self, session: Session, job: Job) -> dict[str, Any]:
        return {
            "generation": self._generation(session, job.input["generation_id"]),
            "manifest": self._manifest(session, job.input["version_id"]),
            "num_images": get_version(session, job.input["version_id"]).num_images,
            "runtime": job.input.get("runtime") or to_dict(RuntimeConfig()),
        }

    def _select(self, session: Session, job: Job) -> dict[str, Any]:
        row = get_set(session, job.input["pseudo_label_set_id"])
        run = get_run(session, row.run_id) if row.run_id else None
        kept = row.selection["keep_keys_of_set_id"]
        cut = None
        if run is not None and run.validation_version_id is None:
            labeled = self._manifest(session, run.labeled_version_id)
            cut = {"labeled": labeled, "ratio": run.recipe["validation_ratio"], "seed": run.recipe["seed"]}
        return {
            "shards": self._shards(session, row, "label"),
            "selection_shards": self._shards(session, row, "select") if row.selection_generation_id else [],
            "unlabeled": self._manifest(session, row.unlabeled_version_id),
            "evaluation": [self._manifest(session, version_id) for version_id in row.selection["evaluation_version_ids"]],
            "validation_cut": cut,
            "class_names": get_generation(session, row.generation_id).class_names,
            "selection": {name: value for name, value in row.selection.items() if name not in _NOT_SELECTION},
            "seed": row.seed,
            "keep_keys_of": self._selected(session, kept) if kept else None,
        }

    def _train(self, session: Session, job: Job) -> dict[str, Any]:
        assert job.run_id is not None
        run = get_run(session, job.run_id)
        role, student, set_id = job.input["role"], job.input["student"], job.input["pseudo_label_set_id"]
        teacher_id = job.input["teacher_generation_id"]
        teacher = get_generation(session, teacher_id) if teacher_id else None
        network = (run.recipe["teacher"] if role == "teacher" else student)["network"]
        versions = {"labeled": run.labeled_version_id, "validation": run.validation_version_id, "test": run.test_version_id}
        if role == "student":
            versions["unlabeled"] = job.input["unlabeled_version_id"]
        paths = {name: self._manifest(session, version_id) if version_id else None for name, version_id in versions.items()}
        return {
            "role": role,
            "iteration": job.iteration,
            "recipe": run.recipe,
            "runtime": run.runtime or run.recipe["runtime"],
            "student": student,
            "unlabeled": None,
            **paths,
            "selected": self._selected(session, set_id) if set_id else None,
            "initial_weights": self._initial_weights(session, network["initial_weights"], teacher_id),
            "teacher": self._generation(session, teacher_id) if role == "student" and student.get("distillation") else None,
            "teacher_parameters": teacher.num_parameters if teacher else None,
            "lineage": _lineage(session, job, run, teacher, versions),
        }

    def _initial_weights(self, session: Session, weights: str | None, teacher_id: str | None) -> _Folder | None:
        if weights == "teacher" and teacher_id:
            return self._generation(session, teacher_id)
        if weights is not None and weights.startswith("generation:"):
            return self._generation(session, weights.removeprefix("generation:"))
        return None

    def _manifest(self, session: Session, version_id: str) -> _File:
        version = get_version(session, version_id)
        if version.manifest_digest is None:
            raise NotReady(f"dataset version {version_id} is {version.status}", status=version.status)
        return _File("manifest.parquet", version.manifest_digest)

    def _generation(self, session: Session, generation_id: str) -> _Folder:
        generation = get_generation(session, generation_id)
        return _Folder(generation.id, {row.name: row.digest for row in list_files(session, generation.id)})

    def _shards(self, session: Session, row: PseudoLabelSet, purpose: str) -> list[_File]:
        shards = list_shards(session, row.id, purpose=purpose)
        missing = [job_id for job_id, digest in shards if digest is None]
        if missing:
            raise NotFound(f"jobs {', '.join(missing[:5])} of set {row.id} have no shard", jobs=missing[:100])
        return [_File("shard.parquet", digest) for _, digest in shards if digest is not None]

    def _selected(self, session: Session, set_id: str) -> _File:
        digests = {row.name: row.digest for row in list_files(session, set_id)}
        if "selected.parquet" not in digests:
            raise NotReady(f"pseudo-label set {set_id} is {get_set(session, set_id).status}")
        return _File("selected.parquet", digests["selected.parquet"])


def _looked_at(session: Session, job: Job) -> list[str]:
    """Dataset versions whose images the attempt opens; selecting and splitting look at manifests only."""
    if job.kind in ("label", "predict"):
        return [job.input["version_id"]]
    if job.kind != "train" or job.run_id is None:
        return []
    run = get_run(session, job.run_id)
    versions = (run.labeled_version_id, run.validation_version_id, run.test_version_id, job.input.get("unlabeled_version_id"))
    return [version_id for version_id in versions if version_id]


def _lineage(session: Session, job: Job, run: Run, teacher: Generation | None, versions: dict[str, str | None]) -> dict[str, Any]:
    """What the model card and the generation's row tell of its origin."""
    set_id = job.input["pseudo_label_set_id"]
    report = (get_set(session, set_id).report or {}) if set_id else {}
    facts: dict[str, Any] = {
        "software": f"noisy-student-server {VERSION}",
        "run": run.id,
        "iteration": job.iteration,
        "generation": job.generation_id,
        "recipe": run.recipe["name"],
        "seed": run.recipe["seed"],
        "datasets": {name: _dataset(session, version_id) for name, version_id in versions.items() if version_id},
        "teacher": None if teacher is None else {"generation": teacher.id, "digest": teacher.digest},
    }
    if set_id:
        counts = {name: report[name] for name in ("num_pool", "num_unique", "num_rows") if name in report}
        facts["pseudo_labels"] = {"set": set_id, **counts}
    plan = session.scalar(sa.select(Iteration.plan).where(Iteration.run_id == run.id, Iteration.number == job.iteration)) or {}
    return facts | ({"warnings": plan["warnings"]} if plan.get("warnings") else {})


def _dataset(session: Session, version_id: str) -> dict[str, Any]:
    version: DatasetVersion = get_version(session, version_id)
    return {"version": version.id, "manifest": version.manifest_digest, "num_images": version.num_images}
