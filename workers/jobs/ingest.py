"""Read a folder into a manifest and a report. No torch."""

from __future__ import annotations

from pathlib import Path

from ml.ingestion import scan
from workers.jobs import Made, Work


def run(work: Work) -> Made:
    """Input: folder, kind."""
    manifest, report = scan(Path(work.input["folder"]), kind=work.input["kind"], on_event=work.on_event, should_stop=work.should_stop)
    path = work.directory / "manifest.parquet"
    manifest.write(path)
    facts = {"num_images": len(manifest), "num_usable": len(manifest.usable()), "class_names": list(manifest.class_names)}
    return Made(files={"manifest.parquet": path}, result={"manifest": facts, "report": report})
