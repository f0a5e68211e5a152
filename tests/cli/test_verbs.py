"""The verbs against a real API: what they print for people and programs, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import progress
from cli.demo import choose_student
from cli.main import run
from cli.output import Output
from cli.runs import describe_plan, set_values
from ml.config import StudentConfig
from ml.recipes import build_recipe, get_recipe
from ml.validation import to_dict
from tests.cli.builders import command
from tests.server.builders import Api, add_job, add_run, add_worker, api_on_a_socket, fail, start_job, succeed

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with api_on_a_socket(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def call(api: Api, capsys: pytest.CaptureFixture[str]) -> Call:
    def call_it(*arguments: str) -> tuple[int, str, str]:
        code = run(["--url", str(api.client.base_url), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call_it


def test_jobs_are_listed_as_a_table_for_people_and_as_json_for_programs(api: Api, call: Call) -> None:
    job = add_job(api.database, kind="predict", input={})

    _, table, _ = call("jobs", "list", "--kind", "predict")
    _, text, _ = call("jobs", "list", "--kind", "predict", "--json")

    assert job.id in table
    assert [one["id"] for one in json.loads(text)] == [job.id]


def test_a_refusal_is_one_line_on_stderr_and_ends_with_1(call: Call) -> None:
    code, out, err = call("jobs", "show", "job_nowhere")

    assert (code, out) == (1, "")
    assert err.splitlines() == ["error: there is no job 'job_nowhere'"]


def test_a_refusal_for_a_program_has_its_code(call: Call) -> None:
    code, _, err = call("jobs", "show", "job_nowhere", "--json")

    assert code == 1
    assert json.loads(err)["error"]["code"] == "not_found"


def test_a_job_is_canceled_and_queued_again(api: Api, call: Call) -> None:
    job = add_job(api.database)

    canceled = call("jobs", "cancel", job.id)
    retried = call("jobs", "retry", job.id)

    assert canceled[:2] == (0, f"job {job.id} is canceled\n")
    assert retried[:2] == (0, f"job {job.id} is queued again\n")


def test_a_worker_is_listed_drained_and_resumed(api: Api, call: Call) -> None:
    worker, gone = add_worker(api.database, "here"), add_worker(api.database, "gone", silent_seconds=3600)

    verbs = [call("workers", "drain", worker.id), call("workers", "list"), call("workers", "resume", worker.id)]
    _, everyone, _ = call("workers", "list", "--all", "--json")

    assert [code for code, _, _ in verbs] == [0, 0, 0]
    assert verbs[0][1] == f"worker {worker.id} runs nothing and takes no more jobs\n"
    [line] = [line for line in verbs[1][1].splitlines() if line.startswith("wkr_")]
    assert line.split()[:4] == [worker.id, "here", "drains", "cpu"]
    assert verbs[2][1] == f"worker {worker.id} takes jobs\n"
    assert {one["id"]: one["draining_at"] for one in json.loads(everyone)} == {worker.id: None, gone.id: None}


def test_a_key_is_made_shown_once_and_revoked(call: Call) -> None:
    _, made, _ = call("keys", "create", "lab", "--scope", "predict", "--json")
    key = json.loads(made)
    _, listed, _ = call("keys", "list")
    revoked = call("keys", "revoke", key["id"])

    assert key["secret"].startswith("nss_")
    assert key["id"] in listed
    assert key["secret"] not in listed
    assert revoked[0] == 0


def test_a_folder_is_registered_by_its_relative_path(call: Call, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(api.services.settings.dataset_roots[0])
    (root / "pictures").mkdir(exist_ok=True)
    monkeypatch.chdir(root)

    code, text, _ = call("datasets", "add", "pictures", "pictures", "--kind", "unlabeled", "--no-wait", "--json")

    assert code == 0
    assert json.loads(text)["kind"] == "ingest"


def test_images_are_packed_and_made_smaller_on_demand(call: Call, api: Api) -> None:
    root = Path(api.services.settings.dataset_roots[0])
    (root / "large").mkdir(exist_ok=True)

    added = ["datasets", "add", "packed", str(root / "large"), "--kind", "unlabeled", "--no-wait", "--json"]
    without, _, error = call(*added, "--resize", "256")
    code, _, _ = call(*added, "--pack", "--resize", "256")

    assert (without, code) == (2, 0)
    assert "add --pack" in error
    source = api.client.get("/api/v1/datasets/packed").json()["latest_version"]["source"]
    assert source["pack"] == {"shard_bytes": 100_000_000, "resize_shorter_side": 256}


def test_shards_and_lists_are_registered_with_their_format_and_split(call: Call, api: Api) -> None:
    root = Path(api.services.settings.dataset_roots[0])
    (root / "hub").mkdir(exist_ok=True)

    added = ["datasets", "add", "hub", str(root / "hub"), "--kind", "labeled", "--no-wait", "--json"]
    code, text, _ = call(*added, "--format", "parquet", "--split", "train")
    refused, _, _ = call(*added, "--format", "zip")

    assert (code, refused) == (0, 2)
    version = json.loads(call("datasets", "report", "hub", "--json")[1])
    assert version["id"] == json.loads(text)["resources"]["dataset_version_id"]
    assert version["source"] == {"path": str(root / "hub"), "format": "parquet", "split": "train"}


def test_a_run_without_a_recipe_is_refused_with_the_presets(call: Call) -> None:
    code, _, error = call("runs", "start", "--labeled", "a", "--unlabeled", "b", "--set", "seed=3")

    assert code == 2
    assert "small-32px" in error
    assert "--recipe" in error


def test_a_run_tells_what_it_begins_before_hours_of_it_have_passed() -> None:
    recipe = to_dict(build_recipe("photos-224", {"iterations": {"count": 1, "control": True}}))
    run = {"recipe": recipe, "iterations_wanted": 1, "initial_generation_id": None}

    text = describe_plan(run)

    assert text.startswith("224 px: efficientnet_b0 (")
    assert ", then 1 iteration with a student of efficientnet_b0 (" in text
    assert text.endswith(" and its control; device auto")


def test_only_a_named_run_is_canceled(call: Call) -> None:
    code, _, error = call("runs", "cancel")

    assert code == 2
    assert "Missing argument 'run'" in error


def leaves(config: dict[str, Any]) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{rest}" for rest in leaves(value))
        else:
            yield name


def test_what_a_preset_shows_can_be_set(call: Call) -> None:
    _, text, _ = call("recipes", "show", "small-32px")
    _, table, _ = call("recipes", "list")
    pairs = text.splitlines()

    assert "students.0.ratio=3" in pairs
    assert {pair.partition("=")[0] for pair in pairs} >= {f"students.0.{path}" for path in leaves(to_dict(StudentConfig()))}
    assert to_dict(build_recipe("small-32px", set_values({}, pairs))) == to_dict(get_recipe("small-32px"))
    assert "paper-l2" in table


def test_a_log_is_told_once_why_a_job_waits(
    api: Api, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.0)
    waiting = api.client.get(f"/api/v1/jobs/{add_job(api.database, capability='cuda').id}").json()
    output = Output(as_json=False)

    with progress.show_job_progress(output, "reading photos") as on_change:
        on_change(waiting | {"waiting_for": "30 jobs come before it"})
        on_change(waiting | {"waiting_for": "29 jobs come before it"})
        on_change(waiting)

    told = [line.removeprefix(f"reading photos: job {waiting['id']} waits: ") for line in capsys.readouterr().out.splitlines()]
    assert told == ["30 jobs come before it", "no worker with capability cuda"]


def test_predict_before_any_promotion_says_what_to_do(call: Call, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"anything")

    code, _, err = call("predict", str(tmp_path / "image.png"))

    assert code == 1
    assert "noisy-student promote GENERATION" in err


def test_promoting_what_is_not_there_is_refused(call: Call) -> None:
    code, _, err = call("promote", "gen_nowhere")

    assert (code, err) == (1, "error: there is no generation 'gen_nowhere'\n")


def test_watch_prints_each_event_as_a_line_and_ends_with_the_run(api: Api, call: Call) -> None:
    started, job = add_run(api.database)
    succeed(api.database, start_job(api.database, job.id))
    assert call("runs", "cancel", started.id)[0] == 0

    code, out, _ = call("watch", started.id, "--json")

    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["queued", "started", "succeeded", "end"]
    # A canceled run is no success.
    assert code == 1


def test_waiting_for_a_job_that_fails_ends_with_1_and_its_reason(api: Api, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start_job(api.database, add_job(api.database).id)
    fail(api.database, job)
    monkeypatch.setattr("cli.client.Client.post", lambda *_, **__: {"id": job.id, "resources": {}})

    code, _, err = call("datasets", "add", "name", "/folder", "--kind", "labeled")

    assert code == 1
    assert "it broke" in err


def test_doctor_names_everything_that_is_wrong_with_the_machine(api: Api, tmp_path: Path) -> None:
    taken = str(api.client.base_url.port)
    wrong = {"PORT": taken, "REDIS_URL": "redis://127.0.0.1:1", "STORAGE_URL": "s3://bucket", "S3_ENDPOINT_URL": "http://127.0.0.1:1"}

    done = command("doctor", "--json", directory=tmp_path, seconds=200, **{f"NOISY_STUDENT_{name}": value for name, value in wrong.items()})

    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == 1
    assert {"port", "redis", "storage"} <= {finding["name"] for finding in found if finding["verdict"] == "bad"}
    assert {"python", "training", "serving", "cores"} <= {finding["name"] for finding in found if finding["verdict"] == "ok"}


def test_the_demo_chooses_by_validation_and_of_equals_the_later_one() -> None:
    def entry(role: str, iteration: int, validation: float, test: float) -> dict[str, Any]:
        return {"role": role, "iteration": iteration, "validation": {"top1": validation}, "test": {"top1": test}}

    lineage = [
        entry("teacher", 0, 0.99, 0.99),
        entry("student", 1, 0.9, 0.99),
        entry("control", 1, 0.99, 0.9),
        entry("student", 2, 0.9, 0.8),
    ]

    assert choose_student(lineage)["iteration"] == 2
