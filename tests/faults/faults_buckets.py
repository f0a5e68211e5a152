"""A bucket that refuses, breaks off, dawdles, falls silent, is gone for a while, or sends what it was not given."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from tests.builders_services import wait_until
from tests.faults.fault import BEYOND_LEASE_SECONDS, BUCKET, Fault, NotNow, Scene
from tests.faults.s3_proxy import Trouble

SHARE = 0.5
SEEN_SECONDS = 30.0


class BucketTroubled(Fault):
    """Requests to the bucket meet one kind of trouble for longer than a lease."""

    concerns, storages = "storage", BUCKET
    trouble: ClassVar[Trouble]
    share: ClassVar[float] = SHARE
    files_only: ClassVar[bool] = False
    """It happens to files that are fetched, and most that are needed have a copy on the host."""

    def strike(self, scene: Scene) -> dict[str, Any]:
        proxy = scene.stage.bucket_proxy
        assert proxy is not None
        before = proxy.count(self.trouble)
        proxy.begin(self.trouble, share=self.share)
        try:
            if self.files_only:
                # Whoever splits a dataset reads its manifest, of which this host has no copy yet.
                scene.load.split_a_new_one(4_000_000 + scene.number)
                wait_until(lambda: proxy.count(self.trouble) > before, seconds=SEEN_SECONDS, what="a request that meets it")
            else:
                time.sleep(BEYOND_LEASE_SECONDS + scene.chance.random())
        except AssertionError as error:
            raise NotNow("nobody asked the bucket for anything") from error
        finally:
            proxy.end()
        return {"requests": proxy.count(self.trouble) - before}


class BucketRefuses(BucketTroubled):
    """SlowDown, ServiceUnavailable and InternalError."""

    name, trouble = "bucket refuses", "refused"


class BucketReset(BucketTroubled):
    """Connections are reset instead of answered."""

    name, trouble = "bucket connections reset", "reset"


class BucketCut(BucketTroubled):
    """Files break off in the middle."""

    name, trouble, files_only = "bucket answers cut", "cut", True


class BucketSlow(BucketTroubled):
    """Every request takes almost half a second more."""

    name, trouble, share = "bucket slow", "slow", 1.0


class BucketSilent(BucketTroubled):
    """Requests vanish."""

    name, trouble, share = "bucket silent", "silent", 1.0


class BucketAltered(BucketTroubled):
    """Each file that is fetched arrives with a flipped bit the first time."""

    name, trouble, files_only = "bucket answers altered", "altered", True


class BucketStopped(Fault):
    """The store is killed and started again later."""

    name, concerns, storages = "bucket stopped", "storage", BUCKET

    def strike(self, scene: Scene) -> dict[str, Any]:
        server = scene.stage.bucket
        assert server is not None
        server.stop()
        time.sleep(BEYOND_LEASE_SECONDS + scene.chance.random())
        server.start()
        return {}


KINDS: tuple[type[Fault], ...] = (
    BucketRefuses,
    BucketReset,
    BucketCut,
    BucketSlow,
    BucketSilent,
    BucketAltered,
    BucketStopped,
)
