"""Read a folder, tar shards, Parquet files or a list into a manifest and a report. No torch."""

from __future__ import annotations

from ml.ingestion import ingest
from workers.jobs import Made, Work


def run(work: Work) -> Made:
    """Input: path, format, split, kind."""
    manifest = work.directory / "manifest.parquet"
    found = ingest(
        work.input["path"],
        manifest,
        kind=work.input["kind"],
        source_format=work.input["format"] or "auto",
        split=work.input["split"],
        on_event=work.on_event,
        should_stop=work.should_stop,
    )
    facts = {"num_images": found.num_images, "num_usable": found.num_usable, "class_names": list(found.class_names)}
    return Made(files={manifest.name: manifest}, result={"manifest": facts, "report": found.report})
