"""Images in a store that speaks like S3, and how a test reaches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml import objects
from ml.config import ImageConfig, NoiseConfig, RuntimeConfig
from ml.errors import StoreRefused
from ml.ingestion import scan
from tests.builders_services import S3Server, wait_until
from tests.ml import builders_sources as builders
from tests.ml.builders_training import build_plan


def access_to(server: S3Server, **fields: Any) -> objects.Access:
    named = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
    return objects.Access(endpoint_url=server.url, **{**named, **fields})


def address_of(path: Path, server: S3Server) -> str:
    return f"s3://{path.relative_to(server.directory).as_posix()}"


def settle(folder: Path, server: S3Server) -> str:
    """Wait until the store, which looks at its files now and then, lists what lies in the folder; the folder's address."""
    address = address_of(folder, server)
    there = {key: (folder / key).stat().st_size for key in builders.keys_below(folder)}

    def listed() -> dict[str, int]:
        try:
            return {name: num_bytes for name, num_bytes in objects.list_objects(address) if not name.endswith("/")}
        except StoreRefused:
            return {}

    wait_until(lambda: listed() == there, what=f"the files of {address}")
    return address


def training_batches(source: str, *, small: bool, loaders: int) -> Any:
    """Three steps over the labeled images of a source."""
    from ml.data import TrainingBatches

    return TrainingBatches(
        labeled=scan(source, kind="labeled")[0].usable(),
        class_names=("cat", "dog"),
        selected=None,
        unlabeled=None,
        image=ImageConfig(size=32, small_images=small),
        noise=NoiseConfig(),
        # More than there are images: some stand twice in a step.
        plan=build_plan(3, 20),
        seed=5,
        start_step=0,
        runtime=RuntimeConfig(device="cpu", num_threads=1, num_loader_workers=loaders),
    )
