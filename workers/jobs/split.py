"""Cut one manifest of class folders into labeled, validation, test and unlabeled. No torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ml.events import Event
from ml.ingestion import split_folder
from ml.manifest import Manifest
from workers.jobs import Made, Work


def run(work: Work) -> Made:
    """Input: manifest, targets (part → share), seed. A file `<part>.parquet` and a `parts` entry for each part."""
    work.on_event(Event(kind="stage", data={"stage": "ingesting"}))
    shares = {part: target["share"] for part, target in work.input["targets"].items()}
    files, parts = {}, {}
    for part, manifest in split_folder(Manifest.read(work.input["manifest"]), shares, work.input["seed"]).items():
        path = work.directory / f"{part}.parquet"
        manifest.write(path)
        files[path.name] = path
        facts = {"num_images": len(manifest), "num_usable": len(manifest), "class_names": list(manifest.class_names)}
        parts[part] = {"manifest": facts, "report": _report(manifest)}
    return Made(files=files, result={"parts": parts})


def _report(manifest: Manifest) -> dict[str, Any]:
    """What is new about a part; everything else stands in the report of the version it was cut from."""
    classes = Counter(name for name in manifest.column("class_name") if name is not None)
    return {
        "kind": manifest.kind,
        "num_files": len(manifest),
        "num_usable": len(manifest),
        "statuses": {"ok": len(manifest)},
        "classes": dict(sorted(classes.items())),
        "digest": manifest.digest(),
        "warnings": [],
    }
