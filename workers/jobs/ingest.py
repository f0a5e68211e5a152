"""Read a folder, tar shards, Parquet files or a list into a manifest and a report. No torch."""

from __future__ import annotations

from core.storage import path_below
from ml.ingestion import ingest
from ml.packing import Packer, Packing
from workers.jobs import Made, Work


def run(work: Work) -> Made:
    """Input: path, format, split, pack, kind."""
    manifest = work.directory / "manifest.parquet"
    packing = work.input["pack"]
    packer = None if packing is None else Packer(Packing(**packing), work.directory / "shards", path_below)
    found = ingest(
        work.input["path"],
        manifest,
        kind=work.input["kind"],
        source_format=work.input["format"] or "auto",
        split=work.input["split"],
        packer=packer,
        on_event=work.on_event,
        should_stop=work.should_stop,
    )
    facts = {"num_images": found.num_images, "num_usable": found.num_usable, "class_names": list(found.class_names)}
    shards = {} if packer is None else {path.name: path for path in packer.shards}
    return Made(files={manifest.name: manifest, **shards}, result={"manifest": facts, "report": found.report})
