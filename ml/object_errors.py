"""What a store of objects says when it does not give what it is asked for, in the words of ml and of files."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ml.errors import StoreAway, StoreRefused

_GONE = ("NoSuchKey", "NotFound", "404")
_DENIED = ("AccessDenied", "AllAccessDisabled", "403")
_CREDENTIALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException")
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "429")


class BeyondEnd(Exception):
    """The object has no byte at that place."""


class TooLarge(Exception):
    """The object has more bytes than may be read."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"it has {num_bytes} bytes")
        self.num_bytes = num_bytes


class Denied(Exception):
    """This object, or everything."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def store_errors(address: str) -> Iterator[None]:
    """Translate what botocore raises while `address` is asked for."""
    try:
        from botocore import exceptions as raised
    except ImportError as error:
        raise StoreRefused("objects in S3 need boto3: pip install 'noisy-student-server[s3]'") from error

    setup = (raised.ProfileNotFound, raised.ParamValidationError, raised.InvalidConfigError, raised.ConfigParseError)
    try:
        yield
    except raised.ClientError as error:
        raise _translate(error, address) from error
    except (raised.NoCredentialsError, raised.PartialCredentialsError) as error:
        message = f"{address} cannot be read: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise StoreRefused(message, path=address) from error
    except setup as error:
        raise StoreRefused(f"{address} cannot be read: {error}", path=address) from error
    except raised.BotoCoreError as error:
        raise StoreAway(f"{address} cannot be read now: {error}", path=address) from error


def _translate(error: Any, address: str) -> Exception:
    code, text = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"({code}{': ' if text else ''}{text})"
    bucket = address.removeprefix("s3://").partition("/")[0]
    if code in _GONE:
        return FileNotFoundError(errno.ENOENT, "there is no such object", address)
    if code in ("InvalidRange", "416"):
        return BeyondEnd(address)
    if code in ("PreconditionFailed", "412"):
        return OSError(errno.ESTALE, "it was replaced while it was read", address)
    if code == "InvalidObjectState":
        return PermissionError(errno.EACCES, "it is archived; bring it back first", address)
    if code in _DENIED and error.operation_name in ("GetObject", "HeadObject"):
        return Denied(f"the store denies {address} {said}", code)
    if status >= 500 or code in _BUSY:
        return StoreAway(f"{address} cannot be read now: the store answers {said}", path=address)
    if code == "NoSuchBucket":
        why = f"there is no bucket {bucket!r}; correct its name, or the endpoint"
    elif code in _CREDENTIALS:
        why = f"the store refuses the credentials {said}; correct the access key and its secret"
    elif code in _DENIED:
        why = f"the store refuses this key {said}; the secret must be right, and the key needs s3:ListBucket and s3:GetObject on {bucket!r}"
    elif code in _REGION:
        why = f"the bucket {bucket!r} lies in another region {said}; correct the region"
    else:
        why = f"the store answers {said}"
    return StoreRefused(f"{address} cannot be read: {why}", code=code, path=address)
