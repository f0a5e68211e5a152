"""`noisy-student datasets`: folders, shards and lists of images, registered, read and cut into parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import API
from cli.invocation import Invocation, get_invocation
from cli.progress import show_job_progress
from ml.objects import is_address
from ml.sources import FORMATS

app = typer.Typer(no_args_is_help=True, help="Images in folders, tar shards, Parquet files or lists: register, split, list, delete.")
KINDS = ("labeled", "unlabeled", "evaluation")


@app.command("add")
def add(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(help="A new name, for example `flowers`.")],
    path: Annotated[
        str,
        typer.Argument(
            help="A folder of images or of shards, a .tar, .parquet, .csv or .jsonl file, or a pattern like shard-{000..099}.tar; "
            "below one of the service's dataset roots, on the service's machine, or s3://BUCKET/PREFIX of any of these."
        ),
    ],
    kind: Annotated[str, typer.Option(help="labeled or evaluation (with classes), or unlabeled.")],
    source_format: Annotated[str, typer.Option("--format", help=f"What lies there: {', '.join(FORMATS)}.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Of a list or of Parquet files that have several, for example train.")] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Copy the images into tar shards among the service's own files.")] = False,
    resize: Annotated[
        int | None, typer.Option(help="With --pack: make images smaller whose shorter side is longer than this.", min=16, max=8192)
    ] = None,
    new_version: Annotated[bool, typer.Option("--new-version", help="Read it into a further version of a dataset.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Hold on until it is read.")] = True,
) -> None:
    """Register images and have them read."""
    invocation = get_invocation(context)
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(KINDS)}", param_hint="--kind")
    if source_format not in FORMATS:
        raise typer.BadParameter(f"{source_format!r} is none of {', '.join(FORMATS)}", param_hint="--format")
    if resize is not None and not pack:
        raise typer.BadParameter("images are made smaller only where they are copied: add --pack", param_hint="--resize")
    source: dict[str, Any] = {"path": path if is_address(path) else str(Path.cwd() / path), "format": source_format, "split": split}
    if pack:
        source["pack"] = {"resize_shorter_side": resize}
    if new_version:
        job = invocation.client.post(f"{API}/datasets/{name}/versions", {"source": source})
    else:
        job = invocation.client.post(f"{API}/datasets", {"name": name, "kind": kind, "source": source})
    if not wait:
        invocation.output.result(job, f"job {job['id']} reads {source['path']}")
        return
    finish(invocation, job, f"reading {name}")
    version = invocation.client.get(f"{API}/dataset-versions/{job['resources']['dataset_version_id']}")
    invocation.output.result(version, describe_version(name, version))


@app.command("split")
def split(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(help="A labeled or evaluation dataset.")],
    labeled: Annotated[str | None, typer.Option(help="Share of each class (0.1), images per class (200), or `rest`.")] = None,
    validation: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    test: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    unlabeled: Annotated[str | None, typer.Option(help="Likewise; these images lose their labels.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds cut equally.", min=0)] = 0,
    prefix: Annotated[str | None, typer.Option(help="The parts are called PREFIX-labeled and so on [default: the dataset's name].")] = None,
) -> None:
    """Cut one folder of classes into labeled, validation, test and unlabeled datasets; equal pictures stay in one part."""
    invocation = get_invocation(context)
    given = {"labeled": labeled, "validation": validation, "test": test, "unlabeled": unlabeled}
    shares = {part: parse_share(part, text) for part, text in given.items() if text is not None}
    if not shares:
        raise typer.BadParameter("name at least one part, for example --labeled 200 --unlabeled rest")
    body = {"shares": shares, "seed": seed, "name_prefix": prefix}
    job = invocation.client.post(f"{API}/datasets/{name}/splits", body)
    finish(invocation, job, f"splitting {name}")
    parts = {part: invocation.client.get(f"{API}/dataset-versions/{prefix or name}-{part}") for part in shares}
    lines = [describe_version(f"{prefix or name}-{part}", version) for part, version in parts.items()]
    invocation.output.result(parts, "\n".join(lines))


def parse_share(part: str, text: str) -> float | int | str:
    """`rest`, a whole number of images of each class, or a share below 1."""
    if text == "rest":
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise typer.BadParameter(f"{text!r} must be a share below 1, a number of images per class, or rest", param_hint=f"--{part}")
    return share


@app.command("list")
def list_datasets(
    context: typer.Context, kind: Annotated[str | None, typer.Option(help="Only labeled, unlabeled or evaluation ones.")] = None
) -> None:
    """List datasets, newest first."""
    invocation = get_invocation(context)
    items = list(invocation.client.pages(f"{API}/datasets", kind=kind))
    if invocation.output.as_json:
        invocation.output.result(items, "")
        return
    rows = [one | _latest(one["latest_version"]) for one in items]
    columns = {"name": "name", "kind": "kind", "version": "number", "status": "status", "images": "num_images", "usable": "num_usable"}
    invocation.output.table(rows, columns | {"classes": "num_classes", "created": "created_at"})


def _latest(version: dict[str, Any] | None) -> dict[str, Any]:
    if version is None:
        return {"status": "empty"}
    found = {name: version[name] for name in ("number", "status", "num_images", "num_usable")}
    return found | {"num_classes": len(version["class_names"] or []) or None}


@app.command("report")
def report(context: typer.Context, *, name: Annotated[str, typer.Argument(help="A name, NAME:NUMBER, or an id `dsv_…`.")]) -> None:
    """Show what reading a dataset found: broken files, duplicates, classes, sizes."""
    invocation = get_invocation(context)
    version = invocation.client.get(f"{API}/dataset-versions/{name}")
    invocation.output.result(version, "\n".join([describe_version(name, version), *report_lines(version["report"] or {})]))


@app.command("delete")
def delete(context: typer.Context, *, name: Annotated[str, typer.Argument(help="A name, or NAME:NUMBER for one version.")]) -> None:
    """Delete a dataset with all its versions, or one version, if nothing needs it. Images stay, but those that were packed go."""
    invocation = get_invocation(context)
    noun = "dataset-versions" if ":" in name or name.startswith("dsv_") else "datasets"
    invocation.client.delete(f"{API}/{noun}/{name}")
    invocation.output.result({"deleted": name}, f"{name} is gone")


def finish(invocation: Invocation, job: dict[str, Any], doing: str) -> dict[str, Any]:
    """Wait for a job with a bar; JobFailed when it does not succeed."""
    with show_job_progress(invocation.output, doing) as on_change:
        return invocation.client.wait_for_job(job["id"], on_change)


def describe_version(name: str, version: dict[str, Any]) -> str:
    """`flowers (version 1): 1 200 images, 1 198 usable, 10 classes`, and what a person should look at."""
    if version["status"] != "ready":
        return f"{name} (version {version['number']}): {version['status']}, job {version['job_id']}"
    classes = version["class_names"] or []
    text = f"{name} (version {version['number']}): {version['num_images']} images, {version['num_usable']} usable"
    lines = [text + (f", {len(classes)} classes" if classes else "")]
    packed = (version["report"] or {}).get("packed")
    if packed:
        resized = f", {packed['num_resized']} images made smaller" if "num_resized" in packed else ""
        lines.append(f"  packed into {packed['num_shards']} shards of {packed['num_bytes'] / 1e6:.0f} MB together{resized}")
    lines += [f"  note: {warning['message']}" for warning in (version["report"] or {}).get("warnings", [])]
    return "\n".join(lines)


def report_lines(found: dict[str, Any]) -> list[str]:
    """A version's report for people."""
    lines = []
    if found.get("statuses"):
        lines.append("files: " + ", ".join(f"{count} {status}" for status, count in found["statuses"].items()))
    for status, keys in (found.get("examples") or {}).items():
        lines.append(f"  {status}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}")
    if found.get("classes"):
        lines.append("classes: " + ", ".join(f"{name} {count}" for name, count in found["classes"].items()))
    for name, sizes in (found.get("sizes") or {}).items():
        lines.append(f"{name}: {sizes['min']} to {sizes['max']}, median {sizes['median']}")
    repeated = {name: found.get(name) or {} for name in ("duplicate_files", "duplicate_pixels", "near_duplicates")}
    return lines + [
        f"{name.replace('_', ' ')}: {group['num_extra']} in {group['num_groups']} groups"
        for name, group in repeated.items()
        if group.get("num_extra")
    ]
