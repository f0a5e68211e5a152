"""Global options, addresses and keys: found by themselves, and never sent where they do not belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from cli.datasets import parse_share
from cli.invocation import Invocation, find_url
from cli.main import hoist_global_options
from cli.output import Output
from cli.runs import set_values
from core.settings import Settings
from tests.cli.builders import command


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("NOISY_STUDENT_URL", "NOISY_STUDENT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOISY_STUDENT_DATA_DIRECTORY", str(tmp_path))
    (tmp_path / "admin.key").write_text("nss_secret\n", encoding="utf-8")
    return Settings()


def sent_key(url: str | None, key: str | None = None) -> str | None:
    """The Authorization header that a call with these options sends."""
    invocation = Invocation(url=url, key=key, output=Output(as_json=True))
    value: str | None = invocation.client._http.headers.get("Authorization")
    return value


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        (["runs", "list", "--json"], ["--json", "runs", "list"]),
        (["--url", "u", "runs", "list"], ["--url", "u", "runs", "list"]),
        (["predict", "a.png", "--key=k", "b.png"], ["--key=k", "predict", "a.png", "b.png"]),
        (["predict", "--", "--json"], ["predict", "--", "--json"]),
    ],
)
def test_global_options_may_stand_anywhere(typed: list[str], understood: list[str]) -> None:
    assert hoist_global_options(typed) == understood


def test_the_address_comes_from_the_option_then_the_variable_then_the_running_service(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [find_url(None, settings)]
    settings.service_file.write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": 1}), encoding="utf-8")
    found.append(find_url(None, settings))
    monkeypatch.setenv("NOISY_STUDENT_URL", "https://lab.example")
    found += [find_url(None, settings), find_url("other.example:8000", settings)]

    assert found == [
        ("http://127.0.0.1:8000", False),
        ("http://127.0.0.1:9", False),
        ("https://lab.example", True),
        ("http://other.example:8000", True),
    ]


@pytest.mark.usefixtures("settings")
def test_the_data_directorys_key_opens_this_machines_service() -> None:
    assert sent_key(None) == sent_key("http://localhost:9000") == "Bearer nss_secret"


@pytest.mark.usefixtures("settings")
def test_the_data_directorys_key_is_not_sent_to_an_address_that_somebody_names() -> None:
    assert sent_key("https://lab.example") is None
    assert sent_key("https://lab.example", key="nss_mine") == "Bearer nss_mine"


def test_single_values_are_laid_over_a_recipe() -> None:
    laid = set_values(
        {"seed": 1, "image": {"size": 32}}, ["image.size=64", "students.0.ratio=5", "name=mine", "students.0.noise.dropout=0.2"]
    )

    assert laid == {"seed": 1, "image": {"size": 64}, "students": [{"ratio": 5, "noise": {"dropout": 0.2}}], "name": "mine"}


@pytest.mark.parametrize("pair", ["students.1.ratio=5", "seed", "=3"])
def test_a_value_without_a_place_is_refused(pair: str) -> None:
    with pytest.raises(typer.BadParameter, match=pair.split("=", maxsplit=1)[0] or "=3"):
        set_values({}, [pair])


def test_shares_are_numbers_of_images_or_parts_of_one_or_the_rest() -> None:
    assert [parse_share("test", text) for text in ("200", "0.1", "rest")] == [200, 0.1, "rest"]


@pytest.mark.parametrize("text", ["0", "1.5", "-3", "many", "nan"])
def test_a_share_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_share("test", text)


@pytest.mark.parametrize("pair", ["selection.min_confidence=NaN", "seed=1e999", 'teacher={"network": {}, "network": {}}'])
def test_a_set_value_that_json_cannot_keep_is_refused(pair: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"not a number|larger than any|stands twice"):
        set_values({}, [pair])


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"seed": 1, "seed": 2}', "stands twice"), (f'{{"seed": {"9" * 5000}}}', "not valid JSON"), ("{", "not valid JSON")],
)
def test_a_recipe_file_that_cannot_be_meant_is_refused_before_anything_is_asked(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.json").write_text(text, encoding="utf-8")

    done = command("runs", "start", "--labeled", "a", "--unlabeled", "b", "--recipe", "recipe.json", directory=tmp_path)

    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
