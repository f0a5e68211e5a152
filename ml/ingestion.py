"""From a folder to a manifest and a report: every file gets a row, every oddity a line. numpy and pyarrow only, no torch.

Labeled and evaluation folders hold one folder per class (images may lie deeper); unlabeled ones are flat or nested.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml.errors import BadImage, DataError, Interrupted, NoImages, TooFewLabels
from ml.events import Event, OnEvent, ShouldStop, ignore, never
from ml.manifest import Kind, Manifest, Share, split
from ml.pixels import decode, perceptual_hash, pixel_digest, read_bytes

PART_KINDS: dict[str, Kind] = {"test": "evaluation", "validation": "evaluation", "labeled": "labeled", "unlabeled": "unlabeled"}

_EXAMPLES = 100
_CHUNK = 256
# Pillow lets go of the interpreter lock while it decodes; more threads than two would fight over it in between.
_THREADS = 2


def scan(root: str | Path, *, kind: Kind, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> tuple[Manifest, dict[str, Any]]:
    """Read every file below `root`: (manifest with one row per file, JSON-able report).

    Hidden files are left out. Broken files and non-images become rows with their status. Raises NoImages for a missing or
    empty folder or a class without a usable image, TooFewLabels for a labeled folder of one class, DataError for symbolic
    links that lead out of the folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise NoImages(f"{folder} is no folder: give the path of an existing one", path=str(folder))
    folder = folder.resolve()
    found = _find_files(folder, kind)
    on_event(Event(kind="stage", data={"stage": "ingesting"}))
    rows = list(_inspect_all(folder, found.keys, kind, on_event, should_stop))
    manifest = Manifest.from_rows(rows, root=folder, kind=kind)
    _refuse_unusable(manifest, found, folder)
    return manifest, _report(manifest, found)


@dataclass(slots=True)
class _Found:
    root: Path
    kind: Kind
    keys: list[str] = field(default_factory=list)
    class_folders: list[str] = field(default_factory=list)
    escaping: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, key: str) -> None:
        self.left_out.setdefault(reason, []).append(key)


def _find_files(root: Path, kind: Kind) -> _Found:
    found = _Found(root, kind)
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    folders += _sort_entry(entry, prefix, found)
    if found.escaping:
        raise DataError(
            f"symbolic links lead out of {root}: {', '.join(sorted(found.escaping)[:10])}; copy the files in or remove the links",
            keys=sorted(found.escaping)[:_EXAMPLES],
        )
    found.keys.sort()
    return found


def _sort_entry(entry: os.DirEntry[str], prefix: str, found: _Found) -> list[str]:
    """Note the entry in `found`; the prefix of its files when it is a folder to go into."""
    key = f"{prefix}{entry.name}"
    try:
        key.encode()
    except UnicodeEncodeError:
        found.leave_out("their names are not UTF-8", ascii(key))
        return []
    if entry.is_symlink():
        if not Path(entry.path).resolve().is_relative_to(found.root):
            found.escaping.append(key)
            return []
        if entry.is_dir():
            # Its files are reached without it; following it may never end.
            found.leave_out("they are linked folders", key)
            return []
    if entry.is_dir():
        if not prefix:
            found.class_folders.append(entry.name)
        return [f"{key}/"]
    if found.kind != "unlabeled" and not prefix:
        found.leave_out("they lie beside the class folders, not in one", key)
    else:
        found.keys.append(key)
    return []


def _inspect_all(root: Path, keys: list[str], kind: Kind, on_event: OnEvent, should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(keys), _CHUNK):
            if should_stop():
                raise Interrupted(f"stopped after {start} of {len(keys)} files")
            chunk = keys[start : start + _CHUNK]
            for key, facts in zip(chunk, pool.map(lambda key: _inspect(root / key), chunk), strict=True):
                yield {"key": key, "class_name": key.split("/", 1)[0] if kind != "unlabeled" else None, **facts}
            done, seconds = start + len(chunk), time.monotonic() - started
            rate = round(done / max(seconds, 1e-6), 1)
            on_event(Event(kind="progress", data={"done": done, "total": len(keys), "unit": "files", "images_per_second": rate}))


def _inspect(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"digest": "", "pixel_digest": None, "perceptual_hash": None, "bytes": 0, "width": None, "height": None}
    try:
        # Opening a pipe would wait for ever, so only files are opened.
        if path.exists() and not path.is_file():
            raise BadImage("not a regular file", status="unsupported")
        facts["bytes"] = path.stat().st_size if path.exists() else 0
        data = read_bytes(path)
        facts["digest"] = hashlib.sha256(data).hexdigest()
        image = decode(data)
    except BadImage as error:
        return facts | {"status": error.status}
    return facts | {
        "status": "ok",
        "pixel_digest": pixel_digest(image),
        "perceptual_hash": perceptual_hash(image),
        "width": image.width,
        "height": image.height,
    }


def _refuse_unusable(manifest: Manifest, found: _Found, root: Path) -> None:
    if manifest.kind == "unlabeled":
        if not manifest.usable():
            raise NoImages(f"{root} holds no usable image among {len(manifest)} files", **_statuses(manifest))
        return
    if not found.class_folders:
        raise NoImages(f"{root} has no class folders: put the images of each class into a folder of its own", path=str(root))
    empty = sorted(set(found.class_folders) - set(manifest.class_names))
    if empty:
        raise NoImages(
            f"class folders without a usable image: {', '.join(empty[:10])}; add images or remove the folders",
            classes=empty,
            **_statuses(manifest),
        )
    if manifest.kind == "labeled" and len(manifest.class_names) < 2:
        raise TooFewLabels(f"{root} has one class only ({manifest.class_names[0]}): at least two are needed", classes=manifest.class_names)


def _statuses(manifest: Manifest) -> dict[str, Any]:
    examples: dict[str, list[str]] = {}
    statuses = manifest.column("status")
    for key, status in zip(manifest.column("key"), statuses, strict=True):
        if status != "ok" and len(examples.setdefault(status, [])) < _EXAMPLES:
            examples[status].append(key)
    return {"statuses": dict(sorted(Counter(statuses).items())), "examples": examples}


def _report(manifest: Manifest, found: _Found) -> dict[str, Any]:
    usable = manifest.usable()
    keys, pixels = usable.column("key"), usable.column("pixel_digest")
    same_pixels = _groups(keys, pixels)
    first_of_pixels = dict(zip(reversed(pixels), reversed(range(len(pixels))), strict=True))
    once = usable.take(sorted(first_of_pixels.values()))
    report: dict[str, Any] = {
        "kind": manifest.kind,
        "num_files": len(manifest),
        "num_usable": len(usable),
        **_statuses(manifest),
        "classes": dict(sorted(Counter(name for name in usable.column("class_name") if name is not None).items())),
        "sizes": {name: _range(usable.column(name)) for name in ("width", "height", "bytes")},
        "duplicate_files": _duplicates(_groups(keys, usable.column("digest"))),
        "duplicate_pixels": _duplicates(same_pixels),
        "near_duplicates": _duplicates(_groups(once.column("key"), once.column("perceptual_hash"))),
        "digest": manifest.digest(),
    }
    report["warnings"] = _warnings(report, same_pixels, manifest, found)
    return report


def _groups(keys: list[str], values: list[Any]) -> list[list[str]]:
    """Keys that share a value, largest groups first; null shares nothing."""
    members: dict[Any, list[str]] = {}
    for key, value in zip(keys, values, strict=True):
        if value is not None:
            members.setdefault(value, []).append(key)
    return sorted((group for group in members.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))


def _duplicates(groups: list[list[str]]) -> dict[str, Any]:
    extra = sum(len(group) - 1 for group in groups)
    return {"num_groups": len(groups), "num_extra": extra, "examples": [group[:10] for group in groups[:_EXAMPLES]]}


def _range(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _warnings(report: Mapping[str, Any], same_pixels: list[list[str]], manifest: Manifest, found: _Found) -> list[dict[str, Any]]:
    warnings: list[dict[str, Any]] = []

    def warn(code: str, message: str, keys: Sequence[str] = ()) -> None:
        warnings.append({"code": f"ingestion.{code}", "message": message, "examples": list(keys)[:_EXAMPLES]})

    for reason, keys in sorted(found.left_out.items()):
        warn("left_out", f"{len(keys)} entries are left out: {reason}", sorted(keys))
    for status, count in report["statuses"].items():
        if status != "ok":
            warn("unusable_files", f"{count} files are {status}", report["examples"][status])
    lonely = [name for name, count in report["classes"].items() if count == 1]
    if lonely:
        warn("single_image_class", f"{len(lonely)} classes have one image only, too few to cut validation from", lonely)
    if manifest.kind != "unlabeled":
        torn = [group for group in same_pixels if len({key.split("/", 1)[0] for key in group}) > 1]
        if torn:
            warn("contradicting_labels", f"{len(torn)} pictures stand under more than one class", [key for group in torn for key in group])
    extra = report["duplicate_pixels"]["num_extra"]
    if extra:
        warn("duplicates", f"{extra} images repeat the pixels of another one", [group[0] for group in same_pixels])
    return warnings


def find_leakage(evaluation: Sequence[Manifest], others: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Usable images of `evaluation` that also sit in `others`, by file or by pixels; empty is good.

    Each finding names `key` and `evaluation` (its manifest's place), `other_key` and `other`, and `by`: "file" or "pixels".
    Time is linear in all rows together.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    findings = []
    seen: dict[str, tuple[int, str, str]] = {}
    for place, manifest in enumerate(evaluation):
        usable = manifest.usable()
        for key, digest, pixels in zip(usable.column("key"), usable.column("digest"), usable.column("pixel_digest"), strict=True):
            seen.setdefault(pixels, (place, key, digest))
    watched = pa.array(list(seen), pa.string())
    for place, manifest in enumerate(others):
        # Equal files have equal pixels, so one look at the pixels finds both kinds.
        hits = manifest.usable().table
        hits = hits.filter(pc.is_in(hits.column("pixel_digest"), value_set=watched)).select(["key", "digest", "pixel_digest"])
        for hit in hits.to_pylist():
            evaluation_place, key, digest = seen[hit["pixel_digest"]]
            by = "file" if hit["digest"] == digest else "pixels"
            findings.append({"key": key, "evaluation": evaluation_place, "other_key": hit["key"], "other": place, "by": by})
    return findings


def split_folder(manifest: Manifest, shares: Mapping[str, Share], seed: int) -> dict[str, Manifest]:
    """Cut one class-folder manifest into parts named labeled, validation, test, unlabeled, class by class (`ml.manifest.split`).

    Equal pixels stay together, so no part leaks into another; the unlabeled part forgets its classes. Whatever the order
    of `shares`, the parts are the same.
    """
    unknown = sorted(set(shares) - set(PART_KINDS))
    if unknown or manifest.kind == "unlabeled":
        raise DataError(
            f"parts must be among {', '.join(PART_KINDS)} and cut from class folders, got {dict(shares)} of {manifest.kind} images"
        )
    parts = split(manifest, {part: shares[part] for part in PART_KINDS if part in shares}, seed)
    return {part: parts[part].as_kind(PART_KINDS[part]) for part in shares}
