"""The first admin key: one, whoever else sets the service up at that moment, and on the disk before it opens anything."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import cli.up
from cli.up import make_first_key, write_private
from core.db.session import Database
from core.db.tables import ApiKey
from core.settings import Settings


def test_two_who_set_one_service_up_make_one_key(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, create = threading.Barrier(2), cli.up.create_api_key

    def create_slowly(*arguments: Any, **options: Any) -> Any:
        try:
            # Were both allowed here, they would meet.
            both.wait(0.5)
        except threading.BrokenBarrierError:
            both.reset()
        return create(*arguments, **options)

    monkeypatch.setattr(cli.up, "create_api_key", create_slowly)
    settings = Settings(data_directory=tmp_path)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: make_first_key(database, settings), range(2)))

    [secret] = [one for one in made if one is not None]
    assert settings.key_file.read_text().strip() == secret
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(ApiKey)) == 1


def test_a_private_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("replace"), replace(source, target))[1])

    write_private(tmp_path / "key", "secret\n")

    assert done == ["sync", "replace", "sync"]
    assert ((tmp_path / "key").read_text(), (tmp_path / "key").stat().st_mode & 0o777) == ("secret\n", 0o600)
