"""Stored files: whole or not there, named by what is in them."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import StorageDamaged, StorageError
from core.settings import Settings
from core.storage import LocalStorage, Storage, make_storage, materialize
from core.storage.cache import ObjectCache
from core.storage.digests import digest_of
from core.storage.s3 import S3Storage
from tests.builders_disk import watch_disk
from tests.builders_services import S3Server


def make_file(directory: Path, content: bytes = b"weights", name: str = "file") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Every test that takes this runs over both."""
    if request.param == "directory":
        return LocalStorage(tmp_path / "objects")
    server: S3Server = request.getfixturevalue("s3_server")
    return make_storage(
        Settings(storage_url=request.getfixturevalue("s3_url"), s3_endpoint_url=server.url, data_directory=tmp_path / "data")
    )


def names_in(storage: LocalStorage) -> list[str]:
    return sorted(path.name for path in storage.directory.glob("*/*"))


def listed_in(storage: Storage) -> list[str]:
    return sorted(storage.list_old(older_than_seconds=-60, now_seconds=time.time()))


def test_the_same_content_is_kept_once(storage: Storage, tmp_path: Path) -> None:
    first = storage.put(make_file(tmp_path))
    second = storage.put(make_file(tmp_path, name="copy"))

    assert first == second
    assert listed_in(storage) == [first["digest"]]
    assert storage.fetch(first["digest"]).read_bytes() == b"weights"


def test_a_missing_file_is_called_damaged(storage: Storage) -> None:
    for ask in (storage.fetch, storage.verify):
        with pytest.raises(StorageDamaged, match="missing"):
            ask("0" * 64)


def test_an_altered_file_is_found(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    digest = storage.put(make_file(tmp_path))["digest"]
    path = storage.fetch(digest)
    path.chmod(0o644)
    path.write_bytes(b"Weights")

    with pytest.raises(StorageDamaged, match="altered"):
        storage.verify(digest)


def test_a_name_that_is_no_digest_reaches_no_path(storage: Storage) -> None:
    for ask in (storage.fetch, storage.verify, storage.remove):
        with pytest.raises(StorageError, match="not a SHA-256"):
            ask("../" * 20 + "etcpw")


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    make_file(tmp_path, os.urandom(300_000))
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\nfrom core.storage import LocalStorage\nfrom core.errors import StorageFull\n"
        f"signal.signal({int(signal.SIGXFSZ)}, signal.SIG_IGN); resource.setrlimit({resource.RLIMIT_FSIZE}, (100_000, 100_000))\n"
        "try: LocalStorage(Path(sys.argv[1]) / 'objects').put(Path(sys.argv[1]) / 'file')\n"
        "except StorageFull as error: print(error)"
    )

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)

    assert "the disk is full while storing file" in done.stdout
    assert names_in(LocalStorage(tmp_path / "objects")) == []


def test_only_old_files_are_listed_and_what_a_dead_writer_left_is_removed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    old, young = storage.put(make_file(tmp_path))["digest"], storage.put(make_file(tmp_path, b"young"))["digest"]
    os.utime(storage.fetch(old), (0, 0))
    half = storage.fetch(old).with_name(".incoming-dead")
    half.touch()
    os.utime(half, (0, 0))

    listed = list(storage.list_old(older_than_seconds=60, now_seconds=time.time()))

    assert listed == [old]
    assert not half.exists()
    assert storage.fetch(young).exists()


def test_a_file_that_was_kept_again_is_not_removed(storage: Storage, tmp_path: Path) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]

    storage.remove(digest, unless_touched_within_seconds=60)
    assert storage.fetch(digest).exists()

    storage.remove(digest)
    storage.remove(digest)
    assert listed_in(storage) == []


def test_a_storage_that_works_says_so(storage: Storage) -> None:
    storage.check()


def test_a_directory_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "objects").touch()

    with pytest.raises(StorageError, match="the storage directory is not writable"):
        LocalStorage(tmp_path / "objects").check()


def test_a_folder_of_stored_files_appears_whole_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]

    with pytest.raises(StorageDamaged):
        materialize(storage, {"a": digest, "sub/b": "0" * 64}, tmp_path / "cache" / "broken")
    made = materialize(storage, {"a": digest, "sub/b": digest}, tmp_path / "cache" / "whole")

    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["whole"]
    assert (made / "sub" / "b").read_bytes() == b"weights"


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "copied"])
def test_a_folder_of_stored_files_that_has_its_name_outlives_a_power_cut(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "objects")
    digest = storage.put(make_file(tmp_path))["digest"]
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "another file system"))
    steps = watch_disk(monkeypatch)

    materialize(storage, {"a": digest, "sub/b": digest}, tmp_path / "cache" / "made")

    [*before, renamed, after] = steps
    assert renamed == ("rename", str(tmp_path / "cache" / "made"), None)
    assert after == ("sync", str(tmp_path / "cache"), None)
    synced = {str(Path(*Path(path).relative_to(tmp_path / "cache").parts[1:])): content for _, path, content in before}
    assert synced == {".": None, "sub": None} | ({} if linked else {"a": b"weights", "sub/b": b"weights"})


def test_a_sweep_waits_for_whoever_is_about_to_renew_a_file_and_then_leaves_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    (tmp_path / "file").write_text("needed again")
    digest = storage.put(tmp_path / "file")["digest"]
    os.utime(storage.fetch(digest), (0, 0))
    sweep = threading.Thread(target=storage.remove, args=(digest,), kwargs={"unless_touched_within_seconds": 3600})

    with (storage.directory / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        sweep.start()
        # As `put` does between its look and its return.
        sweep.join(0.1)
        assert storage.fetch(digest).exists()
        os.utime(storage.fetch(digest))
    sweep.join(10)

    assert not sweep.is_alive()
    assert storage.fetch(digest).exists()


def test_storing_the_same_content_while_it_is_swept_never_loses_it(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    (tmp_path / "file").write_text("stored again and again")
    digest = storage.put(tmp_path / "file")["digest"]
    lost = 0

    with ThreadPoolExecutor(4) as pool:
        for _ in range(200):
            if (storage.directory / digest[:2] / digest).exists():
                os.utime(storage.directory / digest[:2] / digest, (0, 0))
            sweeps = [pool.submit(storage.remove, digest, unless_touched_within_seconds=3600) for _ in range(3)]
            pool.submit(storage.put, tmp_path / "file").result()
            for sweep in sweeps:
                sweep.result()
            lost += not (storage.directory / digest[:2] / digest).exists()

    assert lost == 0


def test_a_file_that_is_swept_between_two_looks_at_it_is_stored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path / "objects")
    stored = storage.fetch(storage.put(make_file(tmp_path))["digest"])

    def sweep_then_hash(path: Path) -> str:
        if path == stored:
            storage.remove(stored.name)
        return digest_of(path)

    monkeypatch.setattr("core.storage.local.digest_of", sweep_then_hash)
    storage.put(tmp_path / "file")

    assert stored.read_bytes() == b"weights"
    with pytest.raises(StorageDamaged, match="missing"):
        storage.verify(stored.name)


def test_a_file_that_somebody_still_writes_to_is_stored_under_the_digest_of_what_was_stored(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_file(tmp_path, b"first line, ")

    def write_on(path: Path) -> str:
        found = digest_of(path)
        if path == log:
            with log.open("ab") as file:
                file.write(b"and another")
        return found

    monkeypatch.setattr("core.storage.local.digest_of", write_on)
    monkeypatch.setattr("core.storage.s3.digest_of", write_on)
    kept = storage.put(log)

    storage.verify(kept["digest"])
    assert storage.fetch(kept["digest"]).stat().st_size == kept["num_bytes"]


def test_a_large_file_that_is_written_to_while_it_goes_up_is_refused_and_nothing_is_left(
    s3_url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(storage_url=s3_url, s3_endpoint_url=s3_server.url, data_directory=tmp_path / "data")
    storage = make_storage(settings)
    assert isinstance(storage, S3Storage)
    monkeypatch.setattr(storage, "_part_bytes", 5 << 20)
    large = make_file(tmp_path, bytes(11 << 20))

    def write_on(path: Path) -> str:
        found = digest_of(path)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr("core.storage.s3.digest_of", write_on)
    with pytest.raises(StorageError, match="file was written to while it was stored"):
        storage.put(large)

    assert listed_in(storage) == []


def test_who_finds_the_directory_locked_by_a_frozen_process_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.storage.locks._LOCK_SECONDS", 0.1)
    storage = LocalStorage(tmp_path / "objects")
    storage.put(make_file(tmp_path))
    cache = ObjectCache(tmp_path / "objects", max_bytes=1)

    with (tmp_path / "objects" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="stayed locked for 0 s: a process that holds it is frozen"):
            storage.put(tmp_path / "file")
        with pytest.raises(StorageError, match="is frozen"):
            cache.find(digest_of(tmp_path / "file"))


def test_storing_the_content_again_mends_a_file_that_was_altered(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    (tmp_path / "file").write_text("whole")
    digest = storage.put(tmp_path / "file")["digest"]
    stored = storage.fetch(digest)
    stored.chmod(0o644)
    stored.write_text("WHOLE")

    storage.put(tmp_path / "file")

    storage.verify(digest)
