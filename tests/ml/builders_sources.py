"""The same folder of images as tar shards, Parquet and lists, as other people's tools would write them. No torch."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LAYOUTS = ("folder", "tar", "parquet", "csv", "jsonl")
FILES = {"tar": "tars", "parquet": "parquet", "csv": "list.csv", "jsonl": "list.jsonl"}


def keys_below(root: Path) -> list[str]:
    """Paths of all files, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def add_member(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    """A regular file, or whatever `fields` make of it."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """One tar with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add_member(tar, name, data)
    return path


def write_tars(root: Path, out: Path, *, shards: int = 3) -> Path:
    """`out/shard-000.tar` and so on; the images by turns, so that no shard is sorted into the others."""
    keys = keys_below(root)
    for number in range(shards):
        write_tar(out / f"shard-{number:03d}.tar", {key: (root / key).read_bytes() for key in reversed(keys[number::shards])})
    return out


def write_parquet(root: Path, out: Path, *, files: int = 2, row_group: int = 3) -> Path:
    """`out/train-00000-of-00002.parquet` and so on, as Hugging Face's library writes them; a label for class folders."""
    keys = keys_below(root)
    names = sorted({key.split("/")[0] for key in keys}) if all("/" in key for key in keys) else []
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns: dict[str, list[Any]] = {"image": [{"bytes": (root / key).read_bytes(), "path": key} for key in keys]}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
        columns["label"] = [names.index(key.split("/")[0]) for key in keys]
        fields.append(pa.field("label", pa.int64()))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns, schema=pa.schema(fields, metadata=metadata))
    out.mkdir(parents=True, exist_ok=True)
    size = -(-len(keys) // files)
    for number in range(files):
        part = table.slice(number * size, size)
        pq.write_table(part, out / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=row_group)
    return out


def write_lists(root: Path) -> None:
    """`list.csv` and `list.jsonl` beside the images."""
    keys = keys_below(root)
    rows = [{"path": key, "class": key.split("/")[0] if "/" in key else ""} for key in keys]
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "class"])
        writer.writeheader()
        writer.writerows(rows)
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))


def write_layouts(root: Path, out: Path) -> dict[str, Path]:
    """Every layout of the images in `root`, by name; the lists are told by their format, so the folder must be read before."""
    tars, parquet = write_tars(root, out / "tars"), write_parquet(root, out / "parquet")
    lists = out / "listed"
    for key in keys_below(root):
        (lists / key).parent.mkdir(parents=True, exist_ok=True)
        (lists / key).write_bytes((root / key).read_bytes())
    write_lists(lists)
    return {"folder": root, "tar": tars, "parquet": parquet, "csv": lists / "list.csv", "jsonl": lists / "list.jsonl"}
