"""Files in an S3 bucket, or in what speaks like one. `boto3` is loaded on first use.

A digest names one content, so every write is one that may be repeated: nothing here asks the store to compare before it writes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import StorageDamaged, StorageError
from core.storage.cache import ObjectCache
from core.storage.digests import CHUNK_BYTES, altered, digest_of, is_digest, missing, path_below, place_of, storage_errors

ATTEMPTS = 4
"""Requests made for one answer, with growing pauses; and connections for one download, each going on where the last one broke."""
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_GONE = ("404", "NoSuchKey", "NotFound")
_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException")


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Place:
    """Where objects lie."""

    bucket: str
    prefix: str
    endpoint_url: str | None
    """None is AWS."""
    region: str | None

    def __str__(self) -> str:
        """As messages name it."""
        return f"bucket {self.bucket} at {self.endpoint_url or 'AWS'}"

    @property
    def objects(self) -> str:
        """What every key begins with."""
        return f"{self.prefix}/objects/" if self.prefix else "objects/"


class _Found(NamedTuple):
    num_bytes: int
    age_seconds: float


class S3Storage:
    """Objects `PREFIX/objects/ab/abcdef…`, and copies of those that this host used."""

    is_local = False

    def __init__(
        self,
        place: S3Place,
        cache: ObjectCache,
        *,
        renew_seconds: float,
        part_bytes: int = _PART_BYTES,
        read_timeout_seconds: float = 30.0,
    ) -> None:
        """Content that was kept longer than `renew_seconds` ago is uploaded again by `put`; files of two parts or more go up in parts."""
        self.place = place
        self.cache = cache
        self._renew_seconds = renew_seconds
        self._part_bytes = part_bytes
        self._read_timeout_seconds = read_timeout_seconds
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}

    @property
    def root(self) -> str:
        return f"s3://{self.place.bucket}/{self.place.objects}".rstrip("/")

    def _key(self, digest: str) -> str:
        return self.place.objects + path_below(digest)

    def put(self, path: Path) -> dict[str, Any]:
        """Upload it, unless the same was kept a short while ago. What goes up is what the digest says, whoever still writes to the file."""
        with storage_errors(f"storing {path.name}"), self._s3_errors(f"storing {path.name}"):
            before = path.stat()
            data = path.read_bytes() if before.st_size < 2 * self._part_bytes else None
            digest = digest_of(path) if data is None else hashlib.sha256(data).hexdigest()
            num_bytes = before.st_size if data is None else len(data)
            found = self._find(digest)
            # A sweep looks at ages only: what is old and about to be named must be made young, and writing it again does that everywhere.
            if found is None or found.num_bytes != num_bytes or found.age_seconds > self._renew_seconds:
                if data is None:
                    self._upload_in_parts(path, digest, before)
                else:
                    self._client().put_object(Bucket=self.place.bucket, Key=self._key(digest), Body=data)
        return {"digest": digest, "num_bytes": num_bytes}

    def _upload_in_parts(self, path: Path, digest: str, before: os.stat_result) -> None:
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=self._part_bytes,
            multipart_chunksize=self._part_bytes,
            max_concurrency=_PARTS_AT_ONCE,
            preferred_transfer_client="classic",
        )
        with create_transfer_manager(self._client(), config) as manager:
            manager.upload(str(path), self.place.bucket, self._key(digest)).result()
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self._client().delete_object(Bucket=self.place.bucket, Key=self._key(digest))
            raise StorageError(f"{path.name} was written to while it was stored")

    def fetch(self, digest: str, *, verify: bool = False) -> Path:
        """The copy on this host; downloaded when there is none, or when `verify` finds that it is not what it was."""
        place_of(digest)
        doing = f"fetching {digest}"
        with storage_errors(doing), self._s3_errors(doing):
            path = self.cache.find(digest)
            if path is not None and (not verify or digest_of(path) == digest):
                return path
            self._look_twice(lambda: self._download(digest))
            path = self.cache.find(digest)
        if path is None:
            raise StorageError(f"{doing} failed: the copy in {self.cache.directory} was removed by somebody else")
        return path

    def _download(self, digest: str) -> None:
        with self.cache.adding(digest) as file:
            for chunk in self._read(digest):
                file.write(chunk)

    def _look_twice(self, look: Callable[[], object]) -> None:
        """What arrives altered once may have been altered on its way; what does so twice is."""
        try:
            look()
        except StorageDamaged:
            look()

    def _read(self, digest: str) -> Iterator[bytes]:
        """The object's content; at its end StorageDamaged when it is not what the digest says."""
        hashing = hashlib.sha256()
        for chunk in self._read_unverified(digest):
            hashing.update(chunk)
            yield chunk
        if hashing.hexdigest() != digest:
            raise altered(digest, hashing.hexdigest())

    def _read_unverified(self, digest: str) -> Iterator[bytes]:
        """The object's content. A connection that breaks is followed by another one for the rest."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        done = tries = 0
        while True:
            answer = self._get(digest, done)
            total = done + answer["ContentLength"]
            if done and not answer.get("ContentRange", "").startswith(f"bytes {done}-"):
                raise StorageError(f"fetching {digest} failed: the connection broke, and {self.place} cannot send the rest alone")
            tries += 1
            try:
                with closing(answer["Body"]) as body:
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        done += len(chunk)
                        yield chunk
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if tries == ATTEMPTS:
                    raise
            if done == total:
                return

    def _get(self, digest: str, start: int) -> Any:
        from botocore.exceptions import ClientError

        rest = {"Range": f"bytes={start}-"} if start else {}
        try:
            return self._client().get_object(Bucket=self.place.bucket, Key=self._key(digest), **rest)
        except ClientError as error:
            if error.response["Error"]["Code"] in _GONE:
                raise missing(digest) from error
            raise

    def verify(self, digest: str) -> None:
        """Download it, keeping nothing."""
        with self._s3_errors(f"reading {digest}"):
            self._look_twice(lambda: deque(self._read(digest), maxlen=0))

    def remove(self, digest: str, *, unless_touched_within_seconds: float = 0) -> None:
        """Delete the object; copies stay until their hosts need the room."""
        with self._s3_errors(f"removing {digest}"):
            found = self._find(digest)
            # By the store's own clock: the one that was asked when the list was made may be wrong.
            if found is not None and found.age_seconds >= unless_touched_within_seconds:
                self._client().delete_object(Bucket=self.place.bucket, Key=self._key(digest))

    def list_old(self, *, older_than_seconds: float, now_seconds: float) -> Iterator[str]:
        """By the time of the upload, a thousand at a time."""
        with self._s3_errors("listing stored files"):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.place.bucket, Prefix=self.place.objects)
            for page in pages:
                for item in page.get("Contents", ()):
                    name = item["Key"].rpartition("/")[2]
                    if is_digest(name) and now_seconds - item["LastModified"].timestamp() > older_than_seconds:
                        yield name

    def check(self) -> None:
        """List one object: that needs the endpoint, the bucket and the credentials. One try, a few seconds."""
        with self._s3_errors("looking at the storage"):
            self._client(impatient=True).list_objects_v2(Bucket=self.place.bucket, Prefix=self.place.objects, MaxKeys=1)

    def _find(self, digest: str) -> _Found | None:
        """Size and age of the object, both as the store says; None when there is none."""
        from botocore.exceptions import ClientError

        try:
            head = self._client().head_object(Bucket=self.place.bucket, Key=self._key(digest))
        except ClientError as error:
            if error.response["Error"]["Code"] in _GONE:
                return None
            raise
        date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
        moment = parsedate_to_datetime(date) if date else datetime.now(UTC)
        # The header knows no fractions of a second.
        return _Found(head["ContentLength"], max(0.0, (moment - head["LastModified"]).total_seconds()))

    def _client(self, *, impatient: bool = False) -> Any:
        """One for all threads; the impatient one answers yes or no within a few seconds."""
        name = "impatient" if impatient else "patient"
        with self._lock:
            if name not in self._clients:
                self._clients[name] = self._make_client(impatient=impatient)
            return self._clients[name]

    def _make_client(self, *, impatient: bool) -> Any:
        from botocore.config import Config
        from botocore.session import get_session

        config = Config(
            connect_timeout=2 if impatient else 5,
            read_timeout=3 if impatient else self._read_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": 1 if impatient else ATTEMPTS},
            max_pool_connections=32,
            tcp_keepalive=True,
            # The content has its own checksum, its name; stores that only speak like S3 do not all know the newer ones.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Names of buckets are no host names where the endpoint is an address.
            s3={"addressing_style": "path"} if self.place.endpoint_url else None,
        )
        # Without a region boto3 refuses to begin; stores that are not AWS take any.
        session = get_session()
        region = self.place.region or session.get_config_variable("region") or "us-east-1"
        try:
            return session.create_client("s3", endpoint_url=self.place.endpoint_url, region_name=region, config=config)
        except ValueError as error:
            wanted = "must be http://HOST:PORT or https://HOST"
            raise StorageError(f"NOISY_STUDENT_S3_ENDPOINT_URL is {self.place.endpoint_url!r}, but {wanted}") from error

    @contextmanager
    def _s3_errors(self, doing: str) -> Iterator[None]:
        """Translate what boto3 raises, and say what would be right."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except ClientError as error:
            raise self._describe(error, doing) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StorageError(f"{doing} failed: there are no credentials for {self.place}; {advice}") from error
        except BotoCoreError as error:
            raise StorageError(f"{doing} failed: {self.place} does not answer: {error}") from error

    def _describe(self, error: Any, doing: str) -> StorageError:
        code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
        said = f"({code}{': ' if message else ''}{message})"
        if code == "NoSuchBucket":
            why = f"there is no {self.place}; create it, or correct NOISY_STUDENT_STORAGE_URL"
        elif code in _CREDENTIALS:
            why = f"{self.place} refuses the credentials {said}; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif code in ("AccessDenied", "403"):
            needed = "s3:ListBucket on the bucket and s3:GetObject, s3:PutObject and s3:DeleteObject on its objects"
            why = f"{self.place} refuses this key {said}; the secret must be right, and the key needs {needed}"
        elif code in _REGION:
            why = f"{self.place} lies in another region {said}; correct NOISY_STUDENT_S3_REGION"
        else:
            why = f"{self.place} answers {said}"
        return StorageError(f"{doing} failed: {why}", code=code)
