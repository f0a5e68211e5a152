"""The locks say what is installed, never from where, and the images get what was tested."""

from __future__ import annotations

import re

import pytest

from tests.architecture.sources import REPOSITORY

LOCKS = ("all", "api", "worker")


def lock_text(name: str) -> str:
    return (REPOSITORY / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


def pins(name: str) -> dict[tuple[str, str], str]:
    """Version of each package; the second part of a key is its environment marker."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+?)(?: ; (.+?))?(?: \\)?$", lock_text(name), flags=re.MULTILINE)
    return {(package, marker): version for package, version, marker in found}


@pytest.mark.parametrize("name", LOCKS)
def test_no_lock_holds_an_address(name: str) -> None:
    assert re.findall(r"(?i)https?:|file:|git\+|--(?:index|extra-index|find-links|trusted-host)\S*| @ ", lock_text(name)) == []


def test_no_lock_of_another_format_is_kept() -> None:
    names = ("uv.lock", "pylock.toml", "poetry.lock", "Pipfile.lock", "package-lock.json", "yarn.lock")

    assert [name for name in names if (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_with_hashes(name: str) -> None:
    entries = [entry for entry in re.split(r"\n(?=\S)", lock_text(name)) if entry and not entry.startswith("#")]

    assert len(entries) > 40
    assert [entry for entry in entries if "==" not in entry.splitlines()[0] or "--hash=sha256:" not in entry] == []


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_images_have_the_versions_that_were_tested(name: str) -> None:
    tested = {}
    for (package, _marker), version in pins("all").items():
        tested.setdefault(package, set()).add(version)

    assert {package: version for (package, _), version in pins(name).items() if version not in tested.get(package, set())} == {}


def test_the_apis_lock_has_no_torch() -> None:
    packages = {package for package, _ in pins("api")}

    assert {package for package in packages if package.startswith(("torch", "timm", "nvidia", "onnxscript", "triton"))} == set()
    assert {"fastapi", "onnxruntime", "psycopg", "uvicorn", "alembic", "typer"} <= packages


def test_the_workers_lock_has_what_an_attempt_needs() -> None:
    packages = {package for package, _ in pins("worker")}

    assert {"torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "celery", "redis", "psycopg"} <= packages
