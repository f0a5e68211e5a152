"""Promotions every two seconds against two predictor replicas under load, then five times the load that one of them holds.

By hand: `python -m bench promotions`; MINUTES says for how long (5 when nothing is said). Rows in PostgreSQL, as in a fleet. The two
generations prefer different classes, so an answer that names one and has values of the other shows. What is
measured: requests that fail, answers that are not their generation's own, and how long a replica answers with the old generation after
`PUT /aliases/production` has. Under overload: what is accepted keeps its deadline, the rest is refused, memory stays.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from bench.labeling import export
from bench.measurement import Measurement, summary
from bench.photographs import photographs
from bench.service import Service, embedded, free_port, resident_bytes
from core.settings import Settings
from ml.cores import num_cores
from ml.models import WEIGHTS
from tests.builders_services import create_database, running_postgresql

PERIOD_SECONDS = 2.0
REPLICAS = 2
CALLERS = 4
BODIES = 16
OVERLOAD = 5
OVERLOAD_SECONDS = 30.0
_PATH = "/predict?top_k=2"

Expected = dict[tuple[str, int], dict[str, float]]
"""Probabilities by generation and body."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """An API that promotes, replicas that answer, and what they must say."""

    api: Service
    replicas: list[Service]
    generations: list[str]
    bodies: list[bytes]
    expected: Expected

    def caller(self, number: int, replica: int) -> Caller:
        return Caller(self.replicas[replica], self.bodies, self.expected, number)


class Caller(threading.Thread):
    """One connection that asks without a pause, and judges each answer at once."""

    def __init__(self, replica: Service, bodies: list[bytes], expected: Expected, first: int) -> None:
        super().__init__()
        self._replica, self._bodies, self._expected, self._place = replica, bodies, expected, first
        self.stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.generations: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.last_asked: dict[str, float] = {}
        """When the last request was sent that this generation answered."""
        self.seconds: list[float] = []
        self.queue_ms: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._replica.port, timeout=60)
        headers = {"Authorization": f"Bearer {self._replica.key}"}
        while not self.stop.is_set():
            self._place = (self._place + 1) % len(self._bodies)
            asked = time.monotonic()
            try:
                connection.request("POST", _PATH, self._bodies[self._place], headers)
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                # No status: a request that was dropped.
                connection.close()
                status, text = 0, b""
            self.statuses[status] += 1
            if status == 200:
                self._judge(json.loads(text), asked)
        connection.close()

    def _judge(self, body: dict[str, Any], asked: float) -> None:
        generation = body["generation_id"]
        self.generations[generation] += 1
        self.last_asked[generation] = asked
        self.seconds.append(time.monotonic() - asked)
        self.queue_ms.append(body["timings_ms"]["queue"])
        if not is_own(body, self._expected.get((generation, self._place))):
            self.wrong.append(body)


def is_own(body: dict[str, Any], expected: dict[str, float] | None) -> bool:
    """Whether the answer's probabilities are those of the generation that it names."""
    found = probabilities_of(body)
    return expected is not None and found.keys() == expected.keys() and all(abs(found[name] - expected[name]) < 1e-5 for name in found)


def probabilities_of(body: dict[str, Any]) -> dict[str, float]:
    return {candidate["label"]: candidate["probability"] for candidate in body["top"]}


@contextmanager
def calling(callers: list[Caller]) -> Iterator[None]:
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        for caller in callers:
            caller.stop.set()
        for caller in callers:
            caller.join()


def measure() -> Measurement:
    minutes = float(os.environ.get("MINUTES", "5"))
    found = Measurement(name="promotions", details={"minutes": minutes, "period_seconds": PERIOD_SECONDS, "callers": CALLERS})
    bodies = [path.read_bytes() for path in sorted(photographs(BODIES).rglob("*.jpg"))]
    directory = Path(tempfile.mkdtemp(prefix="bench-promotions-"))
    try:
        sources = [_export(directory / "roots" / name, sign) for name, sign in (("one", 1), ("other", -1))]
        with running_postgresql() as postgresql, ExitStack() as stack:
            url = create_database(postgresql, "bench")
            environment = {"NOISY_STUDENT_DATABASE_URL": url, "NOISY_STUDENT_PREDICT": "off"}
            api = stack.enter_context(embedded(directory, roots=directory / "roots", **environment))
            generations = [_import(api, source) for source in sources]
            _promote(api, generations[0])
            replicas = [stack.enter_context(_replica(api, number)) for number in range(REPLICAS)]
            expected = _expect(replicas[0], generations, bodies)
            scene = Scene(api=api, replicas=replicas, generations=generations, bodies=bodies, expected=expected)
            _measure_promotions(scene, 60 * minutes, found)
            _measure_overload(scene, found)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _export(folder: Path, sign: int) -> Path:
    """EfficientNet-B0 with random weights, which prefers the one class or the other."""
    export("photos-224", folder)
    weights = load_file(folder / WEIGHTS)
    [bias] = [name for name in weights if name.endswith("classifier.bias")]
    weights[bias] += np.array([sign, -sign], dtype=weights[bias].dtype)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _import(api: Service, source: Path) -> str:
    job = api.ask("POST", "/api/v1/generations/import", {"folder": str(source), "name": source.name})
    api.finished_job(job["id"], seconds=300)
    return str(api.ask("GET", "/api/v1/generations")["items"][0]["id"])


def _promote(api: Service, generation: str, version: int | None = None) -> int:
    """The alias's new version. Neither generation was ever measured, so the gate has to be forced."""
    precondition = {"If-None-Match": "*"} if version is None else {"If-Match": f'"v{version}"'}
    body = {"generation": generation, "force": True, "reason": "measuring promotions"}
    return int(api.ask("PUT", "/api/v1/aliases/production", body, headers=precondition)["version"])


@contextmanager
def _replica(api: Service, number: int) -> Iterator[Service]:
    folder = api.directory / f"replica-{number}"
    folder.mkdir()
    port = free_port()
    replica = Service(folder, port, {**api.environment, "NOISY_STUDENT_PORT": str(port)}, key=api.key)
    replica.start("predictor", sys.executable, "-m", "server", "--predictor")
    try:
        replica.wait_ready()
        yield replica
    finally:
        replica.stop()


def _expect(replica: Service, generations: list[str], bodies: list[bytes]) -> Expected:
    """What each generation says about each body, asked by its id; the two must disagree about every one."""
    headers = {"Content-Type": "application/octet-stream"}
    expected = {
        (generation, place): probabilities_of(replica.ask("POST", f"{_PATH}&generation={generation}", body, headers=headers))
        for generation in generations
        for place, body in enumerate(bodies)
    }
    one, other = generations
    for place in range(len(bodies)):
        assert any(abs(value - expected[other, place][name]) > 1e-3 for name, value in expected[one, place].items()), place
    return expected


def _measure_promotions(scene: Scene, seconds: float, found: Measurement) -> None:
    callers = [scene.caller(number, number % REPLICAS) for number in range(CALLERS)]
    lags: list[float] = []
    puts: list[float] = []
    version = 1
    end = time.monotonic() + seconds
    with calling(callers):
        while time.monotonic() < end:
            old, new = scene.generations if version % 2 else scene.generations[::-1]
            began = time.monotonic()
            version = _promote(scene.api, new, version)
            answered = time.monotonic()
            puts.append(answered - began)
            time.sleep(max(0.0, began + PERIOD_SECONDS - answered))
            lags.append(max(0.0, *(caller.last_asked.get(old, 0.0) - answered for caller in callers)))
    statuses = sum((caller.statuses for caller in callers), Counter[int]())
    answers = sum((caller.generations for caller in callers), Counter[str]())
    wrong = [body for caller in callers for body in caller.wrong]
    found.figures |= {
        "promotions-failed": float(statuses.total() - statuses[200]),
        "promotions-wrong": float(len(wrong)),
        "promotions-lag": max(lags),
    }
    found.tables["Promotions under load"] = [
        {
            "promotions": len(lags),
            "requests": statuses.total(),
            "failed": statuses.total() - statuses[200],
            "answers of another generation than named": len(wrong),
            "old generation after the answer to PUT, s (median)": summary(lags)["median"],
            "(longest)": summary(lags)["highest"],
            "PUT, s (median)": summary(puts)["median"],
        }
    ]
    found.details |= {"statuses": statuses, "answers": answers, "lags": lags, "put_seconds": puts, "wrong": wrong[:10]}


def _measure_overload(scene: Scene, found: Measurement) -> None:
    """As many connections as fill the queue and its threads, and then five times as many."""
    settings = Settings()
    holds = settings.predict_queue + (settings.predict_threads or num_cores() + 1)
    process = scene.replicas[0].processes["predictor"].pid
    full = [scene.caller(number, 0) for number in range(holds)]
    with calling(full):
        time.sleep(OVERLOAD_SECONDS / 3)
    memory = [resident_bytes(process)]
    callers = [scene.caller(number, 0) for number in range(OVERLOAD * holds)]
    end = time.monotonic() + OVERLOAD_SECONDS
    with calling(callers):
        while time.monotonic() < end:
            time.sleep(0.5)
            memory.append(resident_bytes(process))
    statuses = sum((caller.statuses for caller in callers), Counter[int]())
    deadline_ms = 1000 * settings.predict_deadline_seconds
    queue_ms = [value for caller in callers for value in caller.queue_ms]
    seconds = [value for caller in callers for value in caller.seconds]
    found.figures |= {
        "overload-late": float(sum(value > deadline_ms for value in queue_ms)),
        "overload-failed": float(statuses.total() - statuses[200] - statuses[503] + sum(len(caller.wrong) for caller in callers)),
        "overload-memory": (max(memory) - memory[0]) / 1e6,
    }
    found.tables[f"{OVERLOAD} times as many connections as a replica holds requests, for {OVERLOAD_SECONDS:g} s"] = [
        {
            "connections": len(callers),
            "accepted": statuses[200],
            "refused with 503": statuses[503],
            "anything else": statuses.total() - statuses[200] - statuses[503],
            "longest wait in the queue, s": max(queue_ms) / 1000,
            "accepted, median s": summary(seconds)["median"],
            "memory before, MB": memory[0] / 1e6,
            "grown by at most, MB": (max(memory) - memory[0]) / 1e6,
        }
    ]
    found.details["overload"] = {"statuses": statuses, "memory": memory, "deadline_seconds": settings.predict_deadline_seconds}
