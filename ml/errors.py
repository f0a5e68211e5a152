"""Everything that ml refuses, as a tree.

MlError
├── RecipeError            a recipe or one of its fields is wrong
│   └── UnknownArchitecture    timm has no network of that name
├── DataError              the images or their manifest are wrong
│   ├── NoImages           a folder is missing, empty, or holds no image
│   ├── BadImage           one file cannot be used as an image (`status` says why)
│   ├── ClassMismatch      two sources name different classes
│   ├── Leakage            an evaluation image also sits in labeled or unlabeled
│   ├── StoreRefused       a store of objects refuses: credentials, bucket, region
│   └── TooFewLabels       a class, a batch or a split has fewer labeled images than it needs
├── SelectionError         selection cannot give the student anything useful
│   ├── NothingSelected    no image, or no image of some class, survives; carries the histogram
│   └── PoolTooSmall       the cap asks for more images of a class than the pool holds
├── WeightsError           initial or imported weights cannot be used
├── CheckpointDamaged      a checkpoint is truncated, altered, or of another recipe or data
├── Diverged               the loss stopped being a finite number
├── OutOfMemory            the device has not enough memory for the micro-batch
├── DiskFull               storage is full; nothing half-written stays
├── LoaderLost             a process that made images was killed from outside
├── StoreAway              a store of objects does not answer, or is too busy
└── Interrupted            `should_stop()` said so; a checkpoint was written
"""

from __future__ import annotations

from typing import Any


class MlError(Exception):
    """Base of everything that ml refuses. `details` holds JSON-able facts for programs."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class RecipeError(MlError):
    """A recipe field is unknown, has the wrong type, or lies out of range. `pointer` names it as a JSON pointer."""

    def __init__(self, message: str, *, pointer: str = "", **details: Any) -> None:
        super().__init__(message, pointer=pointer, **details)
        self.pointer = pointer


class UnknownArchitecture(RecipeError):
    """timm has no network of that name."""


class DataError(MlError):
    """The images or their manifest are wrong."""


class NoImages(DataError):
    """A folder is missing, empty, or holds no image."""


class BadImage(DataError):
    """One file cannot be used as an image; `status` is one of `ml.pixels.STATUSES`."""

    def __init__(self, message: str, *, status: str, **details: Any) -> None:
        super().__init__(message, status=status, **details)
        self.status = status


class ClassMismatch(DataError):
    """Two sources that must agree name different classes."""


class Leakage(DataError):
    """An evaluation image also sits in labeled or unlabeled data; `details["keys"]` lists them."""


class StoreRefused(DataError):
    """The store in which the images lie refuses: wrong credentials, no such bucket, another region."""


class TooFewLabels(DataError):
    """A class, a batch or a split has fewer labeled images than it needs."""


class SelectionError(MlError):
    """Selection cannot give the student anything useful."""


class NothingSelected(SelectionError):
    """No image, or no image of some class, survives; `details["histogram"]` shows the confidences per class."""


class PoolTooSmall(SelectionError):
    """The cap asks for more images of a class than the whole pool holds."""


class WeightsError(MlError):
    """Initial or imported weights are untagged, absent, damaged, or of another class list."""


class CheckpointDamaged(MlError):
    """A checkpoint is truncated, altered, or belongs to another recipe or other data."""


class Diverged(MlError):
    """The loss is not a finite number; `details` holds step, loss, learning rate and the last good checkpoint."""


class OutOfMemory(MlError):
    """The device has not enough memory for the micro-batch; halving it may help."""


class DiskFull(MlError):
    """Storage is full; the temporary file was removed and the last complete one is untouched."""


class LoaderLost(MlError):
    """A process that made images was killed from outside; the training goes on from its checkpoint when it is started again."""


class StoreAway(MlError):
    """The store in which the images lie does not answer, or is too busy, after a few tries; later it may."""


class Interrupted(MlError):
    """`should_stop()` returned True; what was done so far is in the last checkpoint."""
