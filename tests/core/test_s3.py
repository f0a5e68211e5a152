"""Stored files in a bucket: what is right comes back, what is wrong is said in words, and copies on this host stay within bounds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from core.errors import SetupError, StorageDamaged, StorageError
from core.settings import Settings
from core.storage import S3Storage, digest_of, make_storage, materialize
from core.storage.cache import ObjectCache
from core.storage.making import read_place
from core.storage.s3 import ATTEMPTS
from tests.builders_services import S3Server, running_s3, wait_until
from tests.faults.s3_proxy import S3Proxy, Trouble

HOUR = 3600.0


def make_s3(
    server: S3Server,
    url: str,
    directory: Path,
    *,
    max_bytes: int = 10**9,
    keep_seconds: float = HOUR,
    endpoint_url: str | None = None,
    **options: Any,
) -> S3Storage:
    settings = Settings(storage_url=url, s3_endpoint_url=endpoint_url or server.url, data_directory=directory)
    cache = ObjectCache(settings.cache_directory / "objects", max_bytes=max_bytes, keep_seconds=keep_seconds)
    return S3Storage(read_place(settings), cache, **{"renew_seconds": HOUR, **options})


def make_file(directory: Path, content: bytes = b"weights", name: str = "file") -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


def copies_in(storage: S3Storage) -> set[str]:
    return {path.name for path in storage.cache.directory.glob("??/*")}


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def age_object(storage: S3Storage, path: Path, seconds: float) -> None:
    """Returns when the store says so too."""
    age(path, seconds)
    wait_until(lambda: (found := storage._find(path.name)) and found.age_seconds > seconds - 5, what="the store's look at its files")


@pytest.fixture
def storage(s3_server: S3Server, s3_url: str, tmp_path: Path) -> S3Storage:
    return make_s3(s3_server, s3_url, tmp_path / "data")


@pytest.fixture
def own_server(s3_credentials: None) -> Iterator[S3Server]:
    """One that a test may stop."""
    with running_s3() as server:
        yield server


def test_another_host_gets_what_was_kept(s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path) -> None:
    empty, full = make_file(tmp_path, b"", "empty"), make_file(tmp_path)

    kept = [storage.put(path) for path in (empty, full)]
    other = make_s3(s3_server, s3_url, tmp_path / "other")

    assert [facts["num_bytes"] for facts in kept] == [0, 7]
    assert [other.fetch(facts["digest"]).read_bytes() for facts in kept] == [b"", b"weights"]
    assert s3_server.path_of(s3_url, kept[1]["digest"]).read_bytes() == b"weights"


def test_a_large_file_goes_up_in_parts(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    # Five megabytes are the smallest part that S3 takes.
    storage = make_s3(s3_server, s3_url, tmp_path / "data", part_bytes=5 << 20)
    path = make_file(tmp_path, os.urandom(12 << 20))
    parts: list[str] = []
    storage._client().meta.events.register("before-call.s3.UploadPart", lambda **event: parts.append(event["event_name"]))

    digest = storage.put(path)["digest"]

    assert len(parts) == 3
    assert digest_of(storage.fetch(digest)) == digest


def test_the_same_content_is_uploaded_once_and_again_when_it_is_old(
    s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path
) -> None:
    path = make_file(tmp_path)
    digest = storage.put(path)["digest"]
    kept = s3_server.path_of(s3_url, digest)
    age_object(storage, kept, HOUR / 2)
    before = kept.stat().st_mtime

    storage.put(path)
    young = kept.stat().st_mtime
    age_object(storage, kept, 2 * HOUR)
    storage.put(path)

    assert young == before
    assert time.time() - kept.stat().st_mtime < 60


@pytest.mark.parametrize("damage", [b"Weights", b"weight", b"weights!"])
def test_an_altered_object_is_refused_and_leaves_no_copy(
    s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path, damage: bytes
) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]
    s3_server.path_of(s3_url, digest).write_bytes(damage)
    wait_until(lambda: (found := storage._find(digest)) and found.num_bytes == len(damage), what="the store's look at its files")

    with pytest.raises(StorageDamaged, match=f"{digest} was altered"):
        storage.fetch(digest)
    with pytest.raises(StorageDamaged, match="altered"):
        storage.verify(digest)

    assert copies_in(storage) == set()


def test_an_altered_copy_is_brought_again_when_it_matters(storage: S3Storage, tmp_path: Path) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]
    copy = storage.fetch(digest)
    copy.chmod(0o644)
    copy.write_bytes(b"Weights")

    assert storage.fetch(digest, verify=True).read_bytes() == b"weights"


def test_what_was_altered_on_its_way_is_asked_for_again(s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]
    line = S3Proxy(s3_server.port)
    try:
        far = make_s3(s3_server, s3_url, tmp_path / "far", endpoint_url=line.url)
        line.begin("altered")

        path = far.fetch(digest)
        line.begin("altered")
        far.verify(digest)
    finally:
        line.close()

    assert path.read_bytes() == b"weights"
    assert line.count("altered") == 2


@pytest.mark.parametrize("trouble", ["refused", "reset", "cut", "slow"])
def test_a_store_that_fails_now_and_then_is_asked_again(
    s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path, trouble: Trouble
) -> None:
    line = S3Proxy(s3_server.port, seed=1)
    try:
        far = make_s3(s3_server, s3_url, tmp_path / "far", endpoint_url=line.url)
        line.begin(trouble, share=0.4)
        contents = [bytes([number]) * 1000 for number in range(4)]

        kept = [far.put(make_file(tmp_path, content))["digest"] for content in contents]
        brought = [far.fetch(digest).read_bytes() for digest in kept]
    finally:
        line.close()

    assert brought == contents
    assert line.count(trouble) > 0


def test_a_missing_bucket_is_named(s3_server: S3Server, s3_credentials: None, tmp_path: Path) -> None:
    storage = make_s3(s3_server, "s3://nowhere/kept", tmp_path / "data")

    for ask in (
        storage.check,
        lambda: storage.put(make_file(tmp_path)),
        lambda: list(storage.list_old(older_than_seconds=0, now_seconds=0)),
    ):
        with pytest.raises(StorageError, match=f"there is no bucket nowhere at {s3_server.url}; create it") as caught:
            ask()
        assert not isinstance(caught.value, StorageDamaged)
    with pytest.raises(StorageError, match="there is no bucket nowhere") as caught:
        storage.fetch("0" * 64)
    assert not isinstance(caught.value, StorageDamaged)


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials_are_named(
    s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    storage = make_s3(s3_server, s3_url, tmp_path / "data")

    for ask in (storage.check, lambda: storage.fetch("0" * 64)):
        with pytest.raises(StorageError, match=f"at {s3_server.url} refuses the credentials .*correct AWS_ACCESS_KEY_ID"):
            ask()
    with pytest.raises(StorageError, match="the secret must be right"):
        storage.put(make_file(tmp_path))


def test_absent_credentials_are_named(s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(StorageError, match=r"there are no credentials for bucket .*; set AWS_ACCESS_KEY_ID"):
        make_s3(s3_server, s3_url, tmp_path / "data").check()


@pytest.mark.parametrize("url", ["s3://", "http://bucket/kept", "s3://bucket/kept?x=1", "bucket"])
def test_an_address_that_is_none_is_refused_at_the_start(url: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="must be s3://BUCKET"):
        make_storage(Settings(storage_url=url, data_directory=tmp_path))


def test_an_endpoint_that_is_none_is_named(s3_credentials: None, tmp_path: Path) -> None:
    settings = Settings(storage_url="s3://bucket", s3_endpoint_url="nonsense", data_directory=tmp_path)

    with pytest.raises(StorageError, match="NOISY_STUDENT_S3_ENDPOINT_URL is 'nonsense'"):
        make_storage(settings).check()


def test_a_store_that_is_away_is_said_quickly_and_everything_works_when_it_is_back(own_server: S3Server, tmp_path: Path) -> None:
    storage = make_s3(own_server, own_server.make_bucket("bucket"), tmp_path / "data")
    known = storage.put(make_file(tmp_path))["digest"]
    storage.fetch(known)
    tries: list[Any] = []
    storage._client().meta.events.register("needs-retry.s3.HeadObject", lambda **event: tries.append(event["attempts"]))
    own_server.stop()

    started = time.monotonic()
    with pytest.raises(StorageError, match=f"{own_server.url} does not answer"):
        storage.check()
    seconds = time.monotonic() - started
    with pytest.raises(StorageError, match=r"storing file failed: .* does not answer"):
        storage.put(make_file(tmp_path))
    copy = storage.fetch(known)
    own_server.start()
    storage.check()
    new = storage.put(make_file(tmp_path, b"new"))["digest"]

    assert seconds < 4
    assert tries[:ATTEMPTS] == [1, 2, 3, 4]
    assert copy.read_bytes() == b"weights"
    assert storage.fetch(new).read_bytes() == b"new"


def test_a_download_whose_connection_breaks_goes_on_where_it_was(own_server: S3Server, tmp_path: Path) -> None:
    storage = make_s3(own_server, own_server.make_bucket("bucket"), tmp_path / "data", read_timeout_seconds=5)
    content = os.urandom(64 << 20)
    digest = storage.put(make_file(tmp_path, content))["digest"]
    ranges: list[str] = []
    storage._client().meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: ranges.append(params["headers"].get("Range", ""))
    )
    chunks = storage._read(digest)

    received = next(chunks)
    own_server.stop()
    own_server.start()
    received += b"".join(chunks)

    assert received == content
    assert ranges[0] == ""
    assert ranges[1].startswith("bytes=")
    assert ranges[1] != "bytes=0-"


def test_threads_and_hosts_that_want_the_same_file_at_once_all_get_it(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    storages = [make_s3(s3_server, s3_url, tmp_path / "data") for _ in range(2)]
    content = os.urandom(3 << 20)
    digest = storages[0].put(make_file(tmp_path, content))["digest"]
    found: list[bytes] = []

    threads = [threading.Thread(target=lambda n=n: found.append(storages[n % 2].fetch(digest).read_bytes())) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [content == one for one in found] == [True] * 8
    assert copies_in(storages[0]) == {digest}


def test_copies_stay_within_their_bound_and_the_longest_unused_go_first(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    storage = make_s3(s3_server, s3_url, tmp_path / "data", max_bytes=3000, keep_seconds=60)
    digests = [storage.put(make_file(tmp_path, bytes([number]) * 1000))["digest"] for number in range(5)]
    first, second, third, fourth, fifth = digests
    for digest, seconds in ((first, 500), (second, 900), (third, 700)):
        age(storage.fetch(digest), seconds)
    storage.fetch(first)

    storage.fetch(fourth)
    after_four = copies_in(storage)
    storage.fetch(fifth)

    # The bound has room for three copies, of which a sixteenth is freed beforehand: two remain beside what is new.
    assert first in after_four
    assert second not in after_four
    assert copies_in(storage) == {first, fourth, fifth}


def test_a_copy_that_somebody_may_use_outlasts_the_bound(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    storage = make_s3(s3_server, s3_url, tmp_path / "data", max_bytes=1000, keep_seconds=60)
    given, linked, unused, newest = [storage.put(make_file(tmp_path, bytes([n]) * 900))["digest"] for n in range(4)]
    materialize(storage, {"model": linked}, tmp_path / "attempt")
    age(tmp_path / "attempt" / "model", 10 * HOUR)
    age(storage.fetch(unused), 10 * HOUR)
    path = storage.fetch(given)

    storage.fetch(newest)

    assert path.read_bytes() == bytes(900)
    assert copies_in(storage) == {given, linked, newest}
    assert (tmp_path / "attempt" / "model").read_bytes() == bytes([1]) * 900


def test_only_old_objects_are_listed_and_one_that_was_kept_again_is_not_removed(
    s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path
) -> None:
    old, young = storage.put(make_file(tmp_path))["digest"], storage.put(make_file(tmp_path, b"young"))["digest"]
    stranger = s3_server.path_of(s3_url, old).with_name("stranger")
    stranger.write_bytes(b"no object of ours")
    age(stranger, 10 * HOUR)
    age_object(storage, s3_server.path_of(s3_url, old), 10 * HOUR)

    listed = list(storage.list_old(older_than_seconds=HOUR, now_seconds=time.time()))
    storage.put(make_file(tmp_path))
    storage.remove(old, unless_touched_within_seconds=HOUR)
    storage.remove(young)
    storage.remove(young)

    assert listed == [old]
    assert s3_server.path_of(s3_url, old).exists()
    assert not s3_server.path_of(s3_url, young).exists()


def test_the_list_goes_on_after_its_first_page(s3_server: S3Server, s3_url: str, storage: S3Storage) -> None:
    digests = {f"{number:064x}" for number in range(1100)}
    for digest in digests:
        path = s3_server.path_of(s3_url, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    listed = list(storage.list_old(older_than_seconds=-HOUR, now_seconds=time.time()))

    assert set(listed) == digests
    assert len(listed) == 1100


def test_what_says_s3_is_s3(s3_server: S3Server, s3_url: str, storage: S3Storage, tmp_path: Path) -> None:
    digest = storage.put(make_file(tmp_path))["digest"]
    client = boto3.client("s3", endpoint_url=s3_server.url, region_name="us-east-1")
    [bucket, prefix] = s3_url.removeprefix("s3://").split("/")

    head = client.head_object(Bucket=bucket, Key=f"{prefix}/objects/{digest[:2]}/{digest}")

    assert head["ContentLength"] == 7
    assert (datetime.now(UTC) - head["LastModified"]).total_seconds() < 60
