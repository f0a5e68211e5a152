"""Label shards hold one row per image, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ml.errors import DataError
from ml.pseudo_labels import dense_probs, is_complete, read_facts, read_shard, write_shard

STATUSES = ["ok", "undecodable", "ok", "missing", "ok"]
KEYS = ["a", "b", "c", "d", "e"]


def build_probs(num_rows: int, num_classes: int = 4, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).dirichlet(np.full(num_classes, 0.3), num_rows).astype(np.float32)


def write(path: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "keys": KEYS,
        "statuses": STATUSES,
        "probs_MK": build_probs(3),
        "class_names": ["w", "x", "y", "z"],
        "stored_probabilities": "all",
        "facts": {"generation": "gen_1", "pool": "abc"},
    } | changes
    write_shard(path, **options)
    return path


@pytest.mark.parametrize("stored", ["all", 2, 1])
def test_one_row_per_image_and_nulls_where_there_is_no_guess(tmp_path: Path, stored: Any) -> None:
    table = read_shard(write(tmp_path / "s.parquet", stored_probabilities=stored))

    probs = build_probs(3)
    assert table.column("key").to_pylist() == KEYS
    assert table.column("status").to_pylist() == STATUSES
    assert table.column("class").to_pylist() == [probs[0].argmax(), None, probs[1].argmax(), None, probs[2].argmax()]
    assert table.column("confidence").to_pylist()[2] == np.float16(probs[1].max())
    assert table.column("confidence").null_count == 2
    dense = dense_probs(table, 4)
    assert (dense[[1, 3]] == 0).all()
    np.testing.assert_allclose(dense[[0, 2, 4]].sum(1), 1, atol=1e-6)


def test_the_full_vector_survives_to_half_precision(tmp_path: Path) -> None:
    dense = dense_probs(read_shard(write(tmp_path / "s")), 4)

    np.testing.assert_allclose(dense[[0, 2, 4]], build_probs(3), atol=1e-3)


def test_the_residual_is_spread_evenly(tmp_path: Path) -> None:
    probs = np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32)
    path = write(tmp_path / "s", keys=["a"], statuses=["ok"], probs_MK=probs, stored_probabilities=2)

    np.testing.assert_allclose(dense_probs(read_shard(path), 4), [[0.5, 0.3, 0.1, 0.1]], atol=1e-3)


def test_slices_and_reordered_rows_keep_their_probabilities(tmp_path: Path) -> None:
    for stored in ("all", 2):
        table = read_shard(write(tmp_path / "s", stored_probabilities=stored))
        whole = dense_probs(table, 4)

        np.testing.assert_array_equal(dense_probs(table.slice(2, 3), 4), whole[2:])
        np.testing.assert_array_equal(dense_probs(table.take([4, 1, 0]), 4), whole[[4, 1, 0]])


def test_a_shard_without_any_guess_is_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path / "s", statuses=["empty"] * 5, probs_MK=np.zeros((0, 4), dtype=np.float32))

    assert (dense_probs(read_shard(path), 4) == 0).all()


def test_a_done_shard_is_recognized_by_its_facts(tmp_path: Path) -> None:
    path = write(tmp_path / "s")

    assert is_complete(path, generation="gen_1", pool="abc")
    assert not is_complete(path, generation="gen_2")
    assert not is_complete(tmp_path / "absent")
    assert read_facts(path)["class_names"] == ["w", "x", "y", "z"]


def test_a_truncated_shard_is_not_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "s")
    path.write_bytes(path.read_bytes()[:-9])

    assert not is_complete(path)
    with pytest.raises(DataError, match="not a readable label shard"):
        read_shard(path)


def test_equal_labels_have_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        write(tmp_path / "s", probs_MK=np.full((3, 4), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="of shape"):
        write(tmp_path / "s", probs_MK=build_probs(5))

    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_so_and_the_old_shard_stays(tmp_path: Path) -> None:
    old = write(tmp_path / "s").read_bytes()
    code = f"""
import resource, signal
from pathlib import Path
from tests.ml.test_pseudo_labels import build_probs, write
from ml.errors import DiskFull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    write(Path({str(tmp_path / "s")!r}), keys=[str(i) for i in range(20000)], statuses=["ok"] * 20000, probs_MK=build_probs(20000))
except DiskFull:
    print("disk full")
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == "disk full\n", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert (tmp_path / "s").read_bytes() == old
