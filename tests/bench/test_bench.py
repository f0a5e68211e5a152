"""When `make bench` passes: every goal met, or missed and explained with a measured breakdown. No timings here."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import goals, load, measurement, promotions, selection
from bench.goals import BY_HAND, GOALS, MEASUREMENTS, explained_goals, judge
from bench.measurement import SHORTFALLS, Measurement, interleaved

EXPLAINED = """# Goals that are missed

## `predict-throughput`: 0.81, wanted 0.85

Where a request's time goes:

| part | ms |
| --- | ---: |
| network | 7.1 |
| HTTP | 1.9 |
"""


def word_of(identity: str, value: float | None, shortfalls: str = "") -> tuple[str, bool]:
    figures = {} if value is None else {identity: value}
    [verdict] = [verdict for verdict in judge(figures, MEASUREMENTS, shortfalls) if verdict.goal.id == identity]
    return verdict.word, verdict.passes


def test_a_goal_at_its_limit_is_met_from_either_side() -> None:
    assert word_of("predict-throughput", 0.85) == ("met", True)
    assert word_of("predict-throughput", 0.849) == ("MISSED", False)
    assert word_of("api-memory", 150.0) == ("met", True)
    assert word_of("api-memory", 150.1) == ("MISSED", False)


def test_a_missed_goal_passes_with_a_measured_breakdown_only() -> None:
    without_numbers = EXPLAINED.replace("7.1", "most").replace("1.9", "little")

    assert word_of("predict-throughput", 0.81, EXPLAINED) == ("missed, explained", True)
    assert word_of("predict-throughput", 0.81, without_numbers) == ("MISSED", False)
    assert word_of("api-memory", 160.0, EXPLAINED) == ("MISSED", False)


def test_a_goal_that_was_not_measured_never_passes() -> None:
    assert word_of("predict-throughput", None, EXPLAINED) == ("NOT MEASURED", False)
    assert word_of("predict-throughput", float("nan")) == ("MISSED", False)


def test_only_goals_of_the_measurements_that_ran_are_judged() -> None:
    verdicts = judge({}, ["selection"], "")

    assert [verdict.goal.id for verdict in verdicts] == ["selection-memory"]


def test_every_explained_shortfall_is_a_goal() -> None:
    assert explained_goals(SHORTFALLS.read_text(encoding="utf-8")) <= {goal.id for goal in GOALS}


def test_every_measurement_is_a_module_that_measures() -> None:
    names = {*MEASUREMENTS, *BY_HAND} - {"job_start"}

    assert all(callable(importlib.import_module(f"bench.{name}").measure) for name in names)
    assert len({goal.id for goal in GOALS}) == len(GOALS)


def test_the_command_fails_when_a_measurement_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "_measure_apart", lambda _name: {})
    monkeypatch.setattr(sys, "argv", ["bench", "selection"])

    code = command.main()

    assert code == 1
    assert "NOT MEASURED" in capsys.readouterr().out


def test_a_result_says_where_and_on_what_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measurement, "RESULTS", tmp_path)
    found = Measurement(name="selection", figures={"selection-memory": 280.0}, details={"seed": 3})

    written: dict[str, Any] = json.loads(measurement.write(found, seconds=1.5).read_text(encoding="utf-8"))

    assert written["figures"] == {"selection-memory": 280.0}
    assert written["details"]["seed"] == 3
    assert {"processor", "cores", "commit", "versions", "measured_at"} <= set(written["facts"])


def test_a_synthetic_pool_can_be_selected_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALLER": 2000, "ROWS": 4000, "SHARD": 1500, "EVALUATION": 1200, "LEAKED": 10}.items():
        monkeypatch.setattr(selection, name, value)

    found = selection.measure()

    assert found.figures["selection-memory"] > 0


def test_disturbed_turns_are_made_again_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.5, 0.0, 0.0, 0.4, 0.0])
    monkeypatch.setattr(measurement, "_share", lambda _before, _after: next(others))
    values = iter(range(100))

    turns = interleaved({"rate": lambda: float(next(values))}, repeats=3, most=6)

    assert turns == {"rate": [1.0, 2.0, 4.0], "others": [0.0, 0.0, 0.0]}


def test_what_takes_minutes_runs_when_it_is_named_only() -> None:
    assert not set(BY_HAND) & set(MEASUREMENTS)
    assert {*BY_HAND, *MEASUREMENTS} == {goal.measurement for goal in GOALS}


def test_an_answer_is_its_generations_own_by_every_value() -> None:
    expected = {"china": 0.25, "flower": 0.75}

    def answer(china: float, flower: float) -> dict[str, Any]:
        return {"top": [{"label": "flower", "probability": flower}, {"label": "china", "probability": china}]}

    assert promotions.is_own(answer(0.25, 0.75), expected)
    assert not promotions.is_own(answer(0.75, 0.25), expected)
    assert not promotions.is_own({"top": answer(0.25, 0.75)["top"][:1]}, expected)
    assert not promotions.is_own(answer(0.25, 0.75), None)


def test_requests_of_the_load_generator_are_whole() -> None:
    request = load.encode("/predict", "nss_key", b"\xff\xd8pixels")

    head, _, body = request.partition(b"\r\n\r\n")
    assert body == b"\xff\xd8pixels"
    assert b"Content-Length: 8" in head
    assert goals.GOALS[0].wanted() == "≥ 0.8"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_the_load_generator_says_what_the_measurement_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.jpg").write_bytes(b"pixels")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(sys, "argv", ["load", str(server.server_address[1]), "/predict", "key", str(tmp_path), "2", "0.2"])
        load.main()
        server.shutdown()

    found = json.loads(capsys.readouterr().out)
    assert found["requests"] > 0
    assert found["errors"] == 0
    assert 0 < found["p50_ms"] <= found["p99_ms"]
