"""The storage that a process's settings ask for."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

from core.errors import SetupError
from core.settings import Settings
from core.storage.cache import ObjectCache
from core.storage.interface import Storage
from core.storage.local import LocalStorage
from core.storage.s3 import S3Place, S3Storage

_RENEW_SHARE = 4
"""What was kept longer ago than a quarter of the sweep's grace period is uploaded again: three quarters are left to name it."""


def make_storage(settings: Settings) -> Storage:
    """Files in the data directory, or in the bucket that `storage_url` names; SetupError for an address that makes no sense.

    Nobody is asked yet whether the bucket is there: `check` does that.
    """
    if settings.storage_url is None:
        return LocalStorage(settings.objects_directory)
    place = read_place(settings)
    if find_spec("boto3") is None:
        raise SetupError("NOISY_STUDENT_STORAGE_URL is set, but boto3 is missing: pip install 'noisy-student-server[s3]'")
    cache = ObjectCache(settings.cache_directory / "objects", max_bytes=settings.cache_max_bytes)
    return S3Storage(place, cache, renew_seconds=settings.orphan_grace_seconds / _RENEW_SHARE)


def read_place(settings: Settings) -> S3Place:
    """Bucket and prefix of `storage_url`."""
    url = urlsplit(settings.storage_url or "")
    if url.scheme != "s3" or not url.hostname or url.query or url.fragment or url.username or url.port:
        raise SetupError(f"NOISY_STUDENT_STORAGE_URL is {settings.storage_url!r}, but must be s3://BUCKET or s3://BUCKET/PREFIX")
    return S3Place(
        bucket=url.netloc,
        prefix=url.path.strip("/"),
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
    )
