"""Objects in S3, or in what speaks like it: listed and read where they lie, never written. boto3 is loaded on first use.

An address is `s3://BUCKET/KEY`. Credentials, endpoint and region are what botocore finds in the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION and so on) unless `use` names others. What is not there is an OSError, as with files;
a store that does not answer is StoreAway, one that refuses is StoreRefused.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from ml.errors import DataError, StoreRefused
from ml.object_errors import BeyondEnd, Denied, TooLarge, store_errors

SCHEME = "s3://"
ATTEMPTS = 4
"""Requests for one answer, with growing pauses; and answers that may break off before the store counts as away."""
THREADS = 32
"""Requests that a process has open at a time."""
_PIECE_BYTES = 8 << 20
_SMALLEST_BLOCK = 64 << 10
_LARGEST_BLOCK = 4 * _PIECE_BYTES
_PAGE = 1000
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class Access(NamedTuple):
    """Whom to ask, and as who; what is None is what botocore finds."""

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    attempts: int = ATTEMPTS
    read_timeout_seconds: float = 30.0


class Listed(NamedTuple):
    """One object below a prefix, or, with a slash behind its name, a folder of them."""

    name: str
    num_bytes: int


_access = Access()
_lock = threading.Lock()
_clients: dict[Access, Any] = {}
_readable: set[tuple[Access, str]] = set()
"""Buckets of which this process has read an object so: there, a single one that is denied is that object's matter."""


def use(access: Access) -> None:
    """From now on this process reads objects so."""
    global _access
    _access = access


def is_address(path: str) -> bool:
    """Whether it begins like one."""
    return path.startswith(SCHEME)


def split_address(address: str) -> tuple[str, str]:
    """Bucket and key, the key without a slash at its end; DataError for what is no address."""
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not is_address(address) or not _BUCKET.fullmatch(bucket):
        raise DataError(f"{address!r} is no address of objects; s3://BUCKET or s3://BUCKET/PREFIX would be", path=address)
    if key and {"", ".", ".."} & set(key.split("/")):
        raise DataError(f"{address!r} has an empty part, `.` or `..` in it; write it without", path=address)
    return bucket, key


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that ask for objects; what runs in them must not wait for them."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="objects")


def read(address: str, *, start: int = 0, length: int | None = None, most: int | None = None, etag: str | None = None) -> bytes:
    """The object, or `length` bytes from `start` on, fewer at its end.

    FileNotFoundError when it is not there, PermissionError when it alone is denied, OSError with ESTALE when it has another `etag`,
    TooLarge when more than `most` bytes would come.
    """
    if length == 0:
        return b""
    bucket, key = split_address(address)
    # Once: another thread may call `use` meanwhile.
    access = _access
    request: dict[str, Any] = {"Bucket": bucket, "Key": key}
    if length is not None:
        request["Range"] = f"bytes={start}-{start + length - 1}"
    if etag is not None:
        request["IfMatch"] = etag
    try:
        with store_errors(address):
            data = _get(access, request, address, most)
    except BeyondEnd:
        return b""
    except Denied as error:
        _explain_denial(access, bucket, key, error)
        raise PermissionError(errno.EACCES, f"the store denies it ({error.code})", address) from error
    _readable.add((access, bucket))
    return data


def _get(access: Access, request: dict[str, Any], address: str, most: int | None) -> bytes:
    """One answer, whole; one that breaks off is asked for again."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    for left in reversed(range(access.attempts)):
        answer = _client(access).get_object(**request)
        with closing(answer["Body"]) as body:
            if "Range" in request and "ContentRange" not in answer:
                raise StoreRefused(f"{address}: the store sends whole objects only, so that no part can be read", path=address)
            if most is not None and answer["ContentLength"] > most:
                raise TooLarge(answer["ContentLength"])
            try:
                data: bytes = body.read()
                return data
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if not left:
                    raise
    raise AssertionError("at least one attempt is made")


def _explain_denial(access: Access, bucket: str, key: str, error: Denied) -> None:
    """Stores deny what is not there to those who may not list, and everything to those who may nothing."""
    if find(f"{SCHEME}{bucket}/{key}") is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", f"{SCHEME}{bucket}/{key}") from error
    if (access, bucket) not in _readable:
        raise StoreRefused(
            f"{error}; reading needs s3:GetObject on the objects and s3:ListBucket on the bucket", code=error.code
        ) from error


def list_objects(address: str, *, deep: bool = True, start: str = "") -> Iterator[Listed]:
    """What lies below the prefix, by name where the store keeps an order; not `deep`: folders for what is in them.

    Only names that begin with `start`. StoreRefused when the bucket is not there or may not be listed.
    """
    bucket, key = split_address(address)
    prefix = f"{key}/" if key else ""
    request = {"Bucket": bucket, "Prefix": prefix + start} | ({} if deep else {"Delimiter": "/"})
    with store_errors(address):
        for page in _client(_access).get_paginator("list_objects_v2").paginate(**request):
            for item in page.get("Contents", ()):
                yield Listed(item["Key"][len(prefix) :], item["Size"])
            for item in page.get("CommonPrefixes", ()):
                yield Listed(item["Prefix"][len(prefix) :], 0)


def find(address: str) -> int | None:
    """How many bytes the object has; None when there is none of that very name. By listing, which says what is wrong with a bucket."""
    folder, _, name = address.rpartition("/")
    if folder in ("s3:/", "s3:"):
        return None
    # The name itself comes before all that only begin like it.
    beginning = islice(list_objects(folder, deep=False, start=name), _PAGE)
    return next((found.num_bytes for found in beginning if found.name == name), None)


def _client(access: Access) -> Any:
    with _lock:
        if access not in _clients:
            _clients[access] = _make_client(access)
        return _clients[access]


def _make_client(access: Access) -> Any:
    try:
        from botocore.config import Config
        from botocore.session import get_session
    except ImportError as error:
        raise StoreRefused("objects in S3 need boto3: pip install 'noisy-student-server[s3]'") from error
    session = get_session()
    named = access.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=5,
        read_timeout=access.read_timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": access.attempts},
        max_pool_connections=THREADS + 8,
        tcp_keepalive=True,
        # Digests are compared by whoever reads; stores that only speak like S3 do not all know these checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Names of buckets are no host names where the endpoint is an address.
        s3={"addressing_style": "path"} if named else None,
    )
    # Without a region boto3 refuses to begin; stores that are not AWS take any.
    region = access.region or session.get_config_variable("region") or "us-east-1"
    keys = {"aws_access_key_id": access.access_key_id, "aws_secret_access_key": access.secret_access_key}
    try:
        return session.create_client("s3", endpoint_url=named, region_name=region, config=config, **keys)
    except ValueError as error:
        raise StoreRefused(f"the endpoint {named!r} of S3 must be http://HOST:PORT or https://HOST") from error


class ObjectFile(io.RawIOBase):
    """An object as a file that can be read anywhere in. Small reads that go on from one another are made of ever larger requests."""

    def __init__(self, address: str) -> None:
        """OSError when it is not there."""
        super().__init__()
        bucket, key = split_address(address)
        access = _access
        try:
            with store_errors(address):
                head = _client(access).head_object(Bucket=bucket, Key=key)
        except Denied as error:
            _explain_denial(access, bucket, key, error)
            raise PermissionError(errno.EACCES, f"the store denies it ({error.code})", address) from error
        self.name, self.size = address, int(head["ContentLength"])
        self.etag = head.get("ETag")
        self._place = 0
        self._block, self._first, self._kept = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(self.size)

    def read(self, size: int = -1) -> bytes:
        """Always as many as there are, up to `size`."""
        left = max(0, self.size - self._place)
        data = self._at(self._place, left if size < 0 else min(size, left))
        self._place += len(data)
        return data

    def _at(self, start: int, length: int) -> bytes:
        end = self._first + len(self._kept)
        if not length:
            return b""
        if not self._first <= start <= start + length <= end:
            # What is large, or lies behind, is no part of going on.
            if length >= _SMALLEST_BLOCK or start < self._first:
                return self._fetch(start, length)
            goes_on = start - end <= self._block
            self._block = min(2 * self._block, _LARGEST_BLOCK) if goes_on and self._block else _SMALLEST_BLOCK
            self._first, self._kept = start, self._fetch(start, min(self._block, self.size - start))
        return self._kept[start - self._first : start - self._first + length]

    def _fetch(self, start: int, length: int) -> bytes:
        if length <= _PIECE_BYTES:
            return read(self.name, start=start, length=length, etag=self.etag)
        starts = range(start, start + length, _PIECE_BYTES)
        pieces = pool().map(lambda at: read(self.name, start=at, length=min(_PIECE_BYTES, start + length - at), etag=self.etag), starts)
        return b"".join(pieces)
