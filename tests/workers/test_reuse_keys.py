"""Which labels are as good as which others: everything that the bytes depend on is in the key, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from core.db.deletion import delete_set
from core.db.files import name_files
from core.db.reuse import ShardKeys, remember_shard, shard_keys
from core.db.session import Database
from core.db.tables import Job, PseudoLabelSet, Run
from core.settings import Settings
from core.storage import LocalStorage
from ml.config import RuntimeConfig
from ml.runtimes import resolve_on_cpu
from ml.validation import to_dict
from tests.builders_histories import Histories
from tests.ml.builders_generations import RUNTIME
from tests.workers.builders import read_events
from tests.workers.builders_reuse import LABELING, add_generation, add_pool, new_number, shards_of, start_set, store
from workers.garbage import collect
from workers.outcomes import record_reuse
from workers.reuse import Reuse, keep, keys_of_result


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.close()


def files_of(storage: LocalStorage, directory: Path, **contents: str) -> dict[str, dict[str, Any]]:
    """Files of a generation that is no real one; `contents` replaces that of a file, dots written as underscores."""
    names = ("model.safetensors", "config.json", "preprocessing.json", "class_names.json", "calibration.json", "README.md")
    return {name: store(storage, directory / "file", contents.get(name.replace(".", "_"), f"the {name}")) for name in names}


CASES: dict[str, dict[str, Any]] = {
    "another import of the same network": {"generation": {}},
    "another model card": {"generation": {"README_md": "other"}},
    "another calibration that is not asked for": {"generation": {"calibration_json": "other"}},
    "the same pool under another name": {"pool": "the manifest"},
    "other shards around it": {"labeling": {"shard_size": 5}},
    "one plain view, said in words": {"labeling": {"views": {"flip": False, "zooms": [1.0], "corners": True}}},
    "another chooser": {"labeling": {"selection_model": "generation:gen_x"}},
    "other loader workers": {"runtime": {"num_loader_workers": 7}},
}
OTHER: dict[str, dict[str, Any]] = {
    "other weights": {"generation": {"model_safetensors": "other"}},
    "another architecture": {"generation": {"config_json": "other"}},
    "another preprocessing": {"generation": {"preprocessing_json": "other"}},
    "other class names": {"generation": {"class_names_json": "other"}},
    "another manifest": {"pool": "another manifest"},
    "other rows": {"rows": (4, 8)},
    "more views": {"labeling": {"views": {"flip": True, "zooms": [1.0], "corners": False}}},
    "fewer rows": {"rows": (0, 3)},
    "other probabilities kept": {"labeling": {"stored_probabilities": 1}},
    "another batch": {"labeling": {"batch_size": 5}},
    "calibrated": {"labeling": {"calibrate": True}},
    "another precision": {"runtime": {"precision": "bf16"}},
    "other threads": {"runtime": {"num_threads": 9}},
    "another device": {"runtime": {"device": "cuda", "precision": "fp32"}},
    "another processor": {"host": {"processor": "other"}},
    "another library": {"host": {"versions": {"torch": "0"}}},
}


class Keys:
    """Keys of shards, by what is changed."""

    def __init__(self, database: Database, directory: Path) -> None:
        self.database, self.directory = database, directory
        self.storage = LocalStorage(directory / "objects")
        self.storage.directory.mkdir()
        self.generation = self._generation()
        self.pool = self._pool("the manifest")

    def _generation(self, **contents: str) -> str:
        return add_generation(self.database, files_of(self.storage, self.directory, **contents), ["cat", "dog"])

    def _pool(self, content: str) -> str:
        return add_pool(self.database, store(self.storage, self.directory / "file", content), 8, name=f"pool-{new_number()}")

    def make(self, case: dict[str, Any]) -> str | None:
        made = self.make_both(case)
        return None if made is None else made.exact

    def make_both(self, case: dict[str, Any]) -> ShardKeys | None:
        start, stop = case.get("rows", (0, 4))
        job_input = {
            "generation_id": self.generation if "generation" not in case else self._generation(**case["generation"]),
            "version_id": self.pool if "pool" not in case else self._pool(case["pool"]),
            "start": start,
            "stop": stop,
            "labeling": LABELING | case.get("labeling", {}),
        }
        runtime = to_dict(RUNTIME) | case.get("runtime", {})
        host = {"processor": "mine", "versions": {"torch": "1"}, "accelerators": []} | case.get("host", {})
        with self.database.reading() as session:
            return shard_keys(session, job_input, runtime=runtime, host=host)


@pytest.fixture
def keys(sqlite: Database, tmp_path: Path) -> Keys:
    return Keys(sqlite, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_what_makes_the_same_bytes_has_the_same_key(keys: Keys, case: str) -> None:
    assert keys.make(CASES[case]) == keys.make({}) is not None


@pytest.mark.parametrize("case", OTHER)
def test_what_may_make_other_bytes_has_another_key(keys: Keys, case: str) -> None:
    assert keys.make(OTHER[case]) not in (keys.make({}), None)


def test_calibrated_labels_depend_on_the_temperature(keys: Keys) -> None:
    calibrated = {"labeling": {"calibrate": True}}

    assert keys.make(calibrated) != keys.make(calibrated | {"generation": {"calibration_json": "other"}})


def test_switched_off_every_shard_is_labeled(keys: Keys) -> None:
    found = []
    for reuse in (True, False):
        set_id = start_set(keys.database, keys.generation, keys.pool, reuse=reuse)
        found.append(Reuse(keys.database, capabilities=("cpu",)).find(shards_of(keys.database, set_id)[0]))
        with keys.database.transaction() as session:
            job = shards_of(keys.database, set_id)[0]
            made = {"num_changed": 0, "halved": False, "runtime": to_dict(RUNTIME)}
            session.execute(sa.update(Job).where(Job.id == job.id).values(status="succeeded"))
            name_files(session, job.id, {"shard.parquet": store(keys.storage, keys.directory / "file", "a shard")})
            remember_shard(session, job.id, keys_of_result(session, job, made))

    again = Reuse(keys.database, capabilities=("cpu",)).find(
        shards_of(keys.database, start_set(keys.database, keys.generation, keys.pool))[0]
    )

    assert found == [None, None]
    assert again is not None
    assert again.is_same


@pytest.mark.parametrize(
    "made",
    [
        {"num_changed": 1, "halved": False, "runtime": to_dict(RUNTIME)},
        {"num_changed": 0, "halved": True, "runtime": to_dict(RUNTIME)},
        {"num_rows": 4},
    ],
    ids=["images were missing", "half the micro-batch", "an older worker"],
)
def test_what_another_attempt_would_not_make_alike_is_never_taken_over(keys: Keys, made: dict[str, Any]) -> None:
    [job, _] = shards_of(keys.database, start_set(keys.database, keys.generation, keys.pool))

    with keys.database.reading() as session:
        assert keys_of_result(session, job, made) is None


def test_an_open_runtime_is_known_on_a_cpu_and_on_an_accelerator_after_its_first_attempt(sqlite: Database) -> None:
    open_one = to_dict(RuntimeConfig())
    on_cpu, on_cuda = (Reuse(sqlite, capabilities=names) for names in (("cpu",), ("cpu", "cuda")))
    before = on_cuda.resolve(open_one)
    told = open_one | {"device": "cuda", "precision": "bf16", "num_threads": 1}

    on_cuda.note(open_one, told)

    assert on_cpu.resolve(open_one) == to_dict(resolve_on_cpu(RuntimeConfig()))
    assert (before, on_cuda.resolve(open_one)) == (None, told)
    assert on_cuda.resolve(told) == told


def test_a_shard_stays_as_long_as_one_of_its_owners_is_there(sqlite: Database, tmp_path: Path) -> None:
    keys = Keys(sqlite, tmp_path)
    shard = store(keys.storage, tmp_path / "file", "a shard that two sets name")
    sets = [start_set(sqlite, keys.generation, keys.pool) for _ in range(2)]
    with sqlite.transaction() as session:
        for set_id in sets:
            for job in shards_of(sqlite, set_id):
                name_files(session, job.id, {"shard.parquet": shard})
        session.execute(sa.update(Job).where(Job.kind == "label").values(status="succeeded"))
        session.execute(sa.update(PseudoLabelSet).values(status="ready"))
    settings = Settings(data_directory=tmp_path, orphan_grace_seconds=0)
    left = []

    for set_id in sets:
        with sqlite.transaction() as session:
            delete_set(session, set_id)
        collect(sqlite, keys.storage, settings)
        left.append((keys.storage.directory / shard["digest"][:2] / shard["digest"]).exists())

    assert left == [True, False]


def test_a_run_whose_first_job_takes_labels_over_keeps_their_runtime(sqlite: Database, tmp_path: Path) -> None:
    histories = Histories(sqlite, tmp_path)
    generation_id, pool = histories.make_import(), histories.add_version("pool", "unlabeled")
    made_by = histories.start_run(initial=generation_id, unlabeled=pool)
    histories.work(most=1)
    [labeled] = histories.ids(Job, Job.run_id == made_by, Job.kind == "label", Job.status == "succeeded")
    knowing = Reuse(sqlite, capabilities=("cpu",))
    with sqlite.transaction() as session:
        job = session.get_one(Job, labeled)
        runtime = knowing.resolve(job.input["runtime"])
        remember_shard(session, labeled, keys_of_result(session, job, {"num_changed": 0, "runtime": runtime}))
        session.execute(sa.update(Run).where(Run.id == made_by).values(status="paused"))
    run_id = histories.start_run(initial=generation_id, unlabeled=pool)
    histories.work(most=0)
    claimed = histories.claim()
    assert claimed is not None
    found = knowing.find(claimed)
    assert found is not None
    kept = keep(histories.storage, found)
    assert kept is not None

    with sqlite.transaction() as session:
        ended = record_reuse(session, claimed, found, *kept, lease_seconds=60)

    assert ended is not None
    assert (ended.run_id, ended.status) == (run_id, "succeeded")
    with sqlite.reading() as session:
        assert session.get_one(Run, run_id).runtime == runtime
    reused = [event.data for event in read_events(sqlite, claimed.id) if event.kind == "reused"]
    assert [data["job_id"] for data in reused] == [labeled]


def test_an_input_that_another_version_wrote_is_left_to_the_attempt(keys: Keys) -> None:
    [job, _] = shards_of(keys.database, start_set(keys.database, keys.generation, keys.pool))
    made = {"num_changed": 0, "halved": False, "runtime": to_dict(RUNTIME)}
    found = []
    for changed in ({"runtime": {"device": "abacus"}}, {"labeling": {"shard_size": 4}}):
        with keys.database.transaction() as session:
            session.get_one(Job, job.id).input = {**job.input, **changed}
        [other, _] = shards_of(keys.database, job.pseudo_label_set_id or "")
        found.append(Reuse(keys.database, capabilities=("cpu",)).find(other))
    with keys.database.reading() as session:
        found.append(keys_of_result(session, other, made))

    assert found == [None, None, None]
