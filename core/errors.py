"""Everything that the service refuses, as a tree. server/errors.py maps each class to a status and a problem type.

ServiceError
├── NotFound                   no row of that id or name
│   └── PredictElsewhere       this API leaves /predict to predictor replicas
├── Expired                    what was asked for was removed for its age; says how to make it again
├── InvalidRequest             the request makes no sense; `pointer` names the field
│   ├── FolderRefused          a folder is missing, or outside the configured roots
│   └── LeakageFound           evaluation images also sit in labeled or unlabeled data; lists the keys
├── Conflict                   the request makes sense, but not now
│   ├── AlreadyExists          a row with that unique name exists
│   ├── NotReady               a dataset, set or generation is still being made
│   ├── WrongState             the job's or run's state does not allow that move
│   ├── StillReferenced        something names what was to be deleted; lists the referrers
│   ├── IdempotencyMismatch    one idempotency key came with two different requests
│   └── GateRefused            the promotion gate found the student worse; carries the comparison
├── PreconditionRequired       an alias moves only with If-Match
├── PreconditionFailed         the ETag is not the current one
├── Unauthenticated            no key, or none that is known
├── Forbidden                  the key lacks the scope
├── PayloadTooLarge            more bytes than the route takes
├── UnsupportedMedia           not an image type that is accepted
├── BadImageRefused            an image that cannot be decoded, or has too many pixels
├── NothingPromoted            /predict before any promotion
├── Overloaded                 the predictor's queue is full
├── TooManyInFlight            one key has too many requests open
├── PredictorHung              an image is in work far too long; the process is to be started anew
├── StorageError               files cannot be kept or read
│   ├── StorageFull            the disk is full; nothing half-written stays
│   └── StorageDamaged         a stored file is missing or does not match its digest
└── SetupError                 this process cannot start; said in one line, exit code 2
    ├── DataDirectoryRefused   not writable, or another `up` holds it
    ├── PortInUse              another process listens there
    ├── SchemaMismatch         the database's migration is not one that this code goes with
    └── SchemaBusy             a migration found its tables in use again and again
"""

from __future__ import annotations

from typing import Any


class ServiceError(Exception):
    """Base of everything that the service refuses. `details` holds JSON-able facts for programs."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class NotFound(ServiceError):
    """No row of that id or name."""


class PredictElsewhere(NotFound):
    """This API leaves `/predict` to predictor replicas."""


class Expired(ServiceError):
    """What was asked for was removed for its age; `details["make_again"]` is the request that makes it again, where there is one."""


class InvalidRequest(ServiceError):
    """The request makes no sense; `details["pointer"]` names the field as a JSON pointer."""


class FolderRefused(InvalidRequest):
    """A folder is missing, or lies outside the configured roots."""


class LeakageFound(InvalidRequest):
    """Evaluation images also sit in labeled or unlabeled data; `details["keys"]` lists them."""


class Conflict(ServiceError):
    """The request makes sense, but not now."""


class AlreadyExists(Conflict):
    """A row with that unique name exists."""


class NotReady(Conflict):
    """A dataset, pseudo-label set or generation is still being made."""


class WrongState(Conflict):
    """The job's or run's state does not allow that move."""


class StillReferenced(Conflict):
    """Something names what was to be deleted; `details["referrers"]` lists it."""


class IdempotencyMismatch(Conflict):
    """One idempotency key came with two different requests."""


class GateRefused(Conflict):
    """The promotion gate found the candidate worse; `details["comparison"]` says by how much."""


class PreconditionRequired(ServiceError):
    """An alias moves only with If-Match (or If-None-Match: * to create it)."""


class PreconditionFailed(ServiceError):
    """The ETag is not the current one."""


class Unauthenticated(ServiceError):
    """No key, or none that is known."""


class Forbidden(ServiceError):
    """The key lacks the scope that the route needs."""


class PayloadTooLarge(ServiceError):
    """More bytes than the route takes."""


class UnsupportedMedia(ServiceError):
    """Not an image type that is accepted."""


class BadImageRefused(ServiceError):
    """An image that cannot be decoded, or has too many pixels."""


class NothingPromoted(ServiceError):
    """`/predict` before any promotion."""


class Overloaded(ServiceError):
    """The predictor's queue is full; `details["retry_after_seconds"]` says when to come back."""


class TooManyInFlight(ServiceError):
    """One key has too many requests to `/predict` open at a time."""


class PredictorHung(ServiceError):
    """An image is in work for far too long; the process is to be started anew."""


class StorageError(ServiceError):
    """Files cannot be kept or read."""


class StorageFull(StorageError):
    """The disk is full; nothing half-written stays."""


class StorageDamaged(StorageError):
    """A stored file is missing or does not match its digest."""


class SetupError(ServiceError):
    """This process cannot start; the message is the one line that a person needs."""


class DataDirectoryRefused(SetupError):
    """The data directory is not writable, or another `up` holds it."""


class PortInUse(SetupError):
    """Another process listens on the port."""


class SchemaMismatch(SetupError):
    """The database's migration is not one that this code goes with."""


class SchemaBusy(SetupError):
    """A migration found its tables in use again and again; nothing of it was done."""
