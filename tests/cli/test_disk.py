"""`disk`, `runs disk` and `gc` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run
from core.db.session import Database
from tests.builders_histories import Histories
from tests.cli.builders import command
from tests.server.builders import api_on_a_socket


def test_gc_says_what_would_go_and_what_keeps_the_rest_and_then_does_it(sqlite_url: str, tmp_path: Path) -> None:
    database = Database(sqlite_url)
    histories = Histories(database, tmp_path)
    run_id = histories.make_run()
    histories.promote(histories.students(run_id)[1])
    histories.store("named by nobody")
    histories.age(days=3)
    environment = {
        "NOISY_STUDENT_DATABASE_URL": sqlite_url,
        "NOISY_STUDENT_DATA_DIRECTORY": str(tmp_path / "data"),
        "NOISY_STUDENT_KEEP_SHARDS_DAYS": "2",
    }
    before = histories.stored()

    dry = command("gc", "--dry-run", directory=tmp_path, **environment)
    untouched = histories.stored() == before
    done = command("gc", "--json", directory=tmp_path, **environment)

    assert (dry.returncode, done.returncode) == (0, 0), dry.stderr + done.stderr
    assert untouched
    assert "NOISY_STUDENT_KEEP_SHARDS_DAYS=2" in dry.stdout
    assert "an alias" in dry.stdout
    answer = json.loads(done.stdout)
    assert [(one["what"], one["num"]) for one in answer["expired"]] == [("shards of guesses", 3)]
    assert answer["num_removed_files"] == 4
    assert len(histories.stored()) == len(before) - 4
    assert {(one["kind"], one["kept_by"]) for one in answer["kept"]} >= {("generations", "an alias")}
    database.close()


def test_storage_is_shown_and_runs_sets_and_datasets_are_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with api_on_a_socket(tmp_path) as api:
        histories = Histories(api.database, tmp_path)
        run_id = histories.make_run()
        set_id = histories.start_set(histories.students(run_id)[0], histories.add_version("deletable", "unlabeled").id)
        capsys.readouterr()

        def call(*arguments: str) -> tuple[int, str]:
            code = run(["--url", str(api.client.base_url), *arguments])
            printed = capsys.readouterr()
            return code, printed.out + printed.err

        shown = [call("disk"), call("runs", "disk", run_id), call("pseudo-labels", "list"), call("pseudo-labels", "disk", set_id)]
        kept = call("runs", "delete", run_id)
        done = [
            call("pseudo-labels", "cancel", set_id),
            call("pseudo-labels", "delete", set_id),
            call("runs", "delete", run_id),
            call("datasets", "delete", "deletable:1"),
            call("datasets", "delete", "deletable"),
        ]

    assert [code for code, _ in (*shown, *done)] == [0] * 9
    for (_, text), said in zip(shown, (run_id, "would free", set_id, "would free"), strict=True):
        assert said in text
    assert kept[0] == 1
    assert f"pseudo-label set {set_id}" in kept[1]
