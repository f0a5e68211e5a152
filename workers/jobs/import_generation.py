"""Turn weights from elsewhere (a timm folder, safetensors only) into a generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ml.errors import ClassMismatch, WeightsError
from workers.jobs import Made, Work


def run(work: Work) -> Made:
    """Input: folder, class_names (None takes those that the folder names)."""
    from ml.export import import_generation
    from ml.models import check_links

    source = Path(work.input["folder"])
    check_links(source)
    class_names = work.input["class_names"] or find_class_names(source)
    output = work.directory / "generation"
    # What a killed attempt left is made again.
    shutil.rmtree(output, ignore_errors=True)
    lineage = {"imported_from": str(source)}
    metrics = import_generation(source, output, class_names=class_names, lineage=lineage)
    files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    return Made(files=files, result={"metrics": metrics, "class_names": list(class_names), "lineage": lineage})


def find_class_names(source: Path) -> list[str]:
    """The class names that the folder states; ClassMismatch when it states none."""
    from ml.models import read_config

    own = source / "class_names.json"
    try:
        named = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else None
    except ValueError as error:
        raise WeightsError(f"{own} is not readable: {error}", folder=str(source)) from error
    if named is None:
        config = read_config(source)
        named = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ClassMismatch(f"{source} does not name its classes: give class_names, in the order of the outputs", folder=str(source))
    return named
