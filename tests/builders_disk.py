"""What is done to a disk, in order: a power cut keeps of it what was synced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

Step = tuple[str, str, bytes | None]


def watch_disk(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Each sync as ("sync", path, content; None for a folder) and each rename as ("rename", target, None), as they happen."""
    steps: list[Step] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append(("sync", str(path), None if path.is_dir() else path.read_bytes()))

    def note_rename(source: Path, target: Path) -> None:
        replace(source, target)
        steps.append(("rename", str(target), None))

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return steps
