"""/predict with EfficientNet-B0 at concurrency 8, against the in-process loop over the same ONNX file.

The loop is the most that these cores can do: as many callers as cores, one thread each, from the same bytes through the same decoding
to logits, no HTTP. Service and load generator share the cores. Answers are compared before anything is timed. There is no cache.
What HTTP adds to the time of a lone request stands beside it.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.labeling import export
from bench.measurement import Measurement, interleaved, summary
from bench.photographs import photographs
from bench.service import Service, embedded
from ml.calibration import softmax
from ml.cores import num_cores
from ml.pixels import Preprocessing, decode, normalize, weak_view

CONCURRENCY = 8
BODIES = 256
COMPARED = 20
CALLS = 100
"""Of which the median says how long one takes with nothing beside it."""
SECONDS = 4.0
REPEATS = 9
_PATH = "/predict?calibrated=false"
_SCRIPT = Path(__file__).with_name("wrk.lua")


def measure() -> Measurement:
    found = Measurement(name="predict", details={"concurrency": CONCURRENCY, "bodies": BODIES, "repeats": REPEATS, "seconds": SECONDS})
    folder = photographs(BODIES)
    directory = Path(tempfile.mkdtemp(prefix="bench-predict-"))
    try:
        source = export("photos-224", directory / "roots" / "b0")
        with embedded(directory, roots=directory / "roots") as service:
            generation = _promote(service, source)
            _measure(service, generation, folder, directory, found)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found


def _promote(service: Service, source: Path) -> str:
    """Import the weights and let /predict answer with them; the generation's id."""
    job = service.ask("POST", "/api/v1/generations/import", {"folder": str(source), "name": "bench"})
    service.finished_job(job["id"], seconds=300)
    generation = str(service.ask("GET", "/api/v1/generations")["items"][0]["id"])
    service.ask("PUT", "/api/v1/aliases/production", {"generation": generation}, headers={"If-None-Match": "*"})
    return generation


def _measure(service: Service, generation: str, folder: Path, directory: Path, found: Measurement) -> None:
    bodies = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    answer = _make_loop(service, generation, directory)
    difference = _compare(service, answer, bodies)
    generator = _wrk if shutil.which("wrk") else _own_generator
    runs: list[dict[str, float]] = []

    def through_http() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = generator(service, folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result["errors"] == 0, result
        result["generator_cores"] = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / result["seconds"]
        runs.append(result)
        return result["requests"] / result["seconds"]

    def in_process() -> float:
        return _loop_rate(answer, bodies)

    in_process()
    through_http()
    runs.clear()
    parts = {
        "loop": in_process,
        "http": through_http,
        "call ms": lambda: _median_call(answer, bodies),
        "request ms": lambda: generator(service, folder, 1)["p50_ms"],
    }
    turns = interleaved(parts, repeats=REPEATS, most=REPEATS + 3)
    ratios = [http / loop for http, loop in zip(turns["http"], turns["loop"], strict=True)]
    found.figures["predict-throughput"] = summary(ratios)["median"]
    found.tables["/predict, EfficientNet-B0 at 224 px (medians of interleaved repeats)"] = [
        {
            "in-process loop/s": summary(turns["loop"])["median"],
            "requests/s": summary(turns["http"])["median"],
            **{name: summary(ratios)[key] for name, key in (("ratio", "median"), ("lowest", "lowest"), ("highest", "highest"))},
            "ms a call": summary(turns["call ms"])["median"],
            "ms a request, one at a time": summary(turns["request ms"])["median"],
            "generator's share of the cores": summary([run["generator_cores"] / num_cores() for run in runs])["median"],
            "others' CPU": summary(turns["others"])["median"],
        }
    ]
    found.details |= {"turns": turns, "runs": runs, "generator": generator.__name__.strip("_"), "largest_difference": difference}


def _make_loop(service: Service, generation: str, directory: Path) -> Callable[[bytes], Any]:
    """From bytes to logits in this process, with the files that the service serves."""
    model = directory / "model.onnx"
    model.write_bytes(service.fetch(f"/api/v1/generations/{generation}/files/model.onnx"))
    words = json.loads(service.fetch(f"/api/v1/generations/{generation}/files/preprocessing.json"))
    preprocessing = Preprocessing.from_dict(words)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def answer(data: bytes) -> Any:
        images = normalize(weak_view(decode(data), preprocessing)[None], preprocessing)
        return session.run(("logits",), {"images": images})[0][0]

    return answer


def _compare(service: Service, answer: Callable[[bytes], Any], bodies: list[bytes]) -> float:
    """Largest difference of a probability between the two, which must be the same function."""
    names = json.loads(service.fetch(f"/api/v1/generations/{_serving(service)}/files/class_names.json"))
    differences = []
    for body in bodies[:: len(bodies) // COMPARED]:
        shown = service.ask("POST", _PATH, body, headers={"Content-Type": "application/octet-stream"})
        theirs = {candidate["label"]: candidate["probability"] for candidate in shown["top"]}
        ours = softmax(answer(body))
        differences.append(np.abs(ours - np.array([theirs[name] for name in names])).max())
    assert max(differences) < 1e-4, differences
    return float(max(differences))


def _serving(service: Service) -> str:
    return str(service.ask("GET", "/api/v1/aliases/production")["generation_id"])


def _loop_rate(answer: Callable[[bytes], Any], bodies: list[bytes]) -> float:
    started = time.perf_counter()
    until = started + SECONDS

    def call(first: int) -> int:
        done = 0
        for body in cycle(bodies[first:] + bodies[:first]):
            if time.perf_counter() >= until:
                return done
            answer(body)
            done += 1
        return done

    with ThreadPoolExecutor(num_cores()) as pool:
        done = sum(pool.map(call, [number * len(bodies) // num_cores() for number in range(num_cores())]))
    return done / (time.perf_counter() - started)


def _median_call(answer: Callable[[bytes], Any], bodies: list[bytes]) -> float:
    """Milliseconds of one call with nothing beside it."""
    seconds = []
    for body in bodies[:CALLS]:
        started = time.perf_counter()
        answer(body)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def _wrk(service: Service, folder: Path, concurrency: int = CONCURRENCY) -> dict[str, float]:
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    command = ["wrk", "-t", "1", "-c", str(concurrency), "-d", f"{SECONDS:g}s", "--timeout", "60s", "-s", str(_SCRIPT), service.url, "--"]
    return _last_json([*command, _PATH, service.key, *files])


def _own_generator(service: Service, folder: Path, concurrency: int = CONCURRENCY) -> dict[str, float]:
    arguments = [str(service.port), _PATH, service.key, str(folder), str(concurrency), str(SECONDS)]
    return _last_json([sys.executable, "-m", "bench.load", *arguments])


def _last_json(command: list[str]) -> dict[str, float]:
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found
