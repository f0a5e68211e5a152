"""How a measurement is made and written: interleaved repeats, an eye on what else the machine does, one JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ml.cores import num_cores

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / "cache"
SHORTFALLS = Path(__file__).parent / "shortfalls.md"

_PACKAGES = ("torch", "timm", "torchvision", "onnxruntime", "pillow", "numpy", "pyarrow", "fastapi", "uvicorn", "sqlalchemy", "celery")
_CALM = 0.05
"""A repeat counts as calm while other processes took at most this share of the cores."""
_FEWEST_CALM = 3


PEAK_MB = """
def peak_mb():
    # Not getrusage's figure: that begins with the memory of whoever started this process.
    [peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(peak.split()[1]) * 1024 / 1e6
"""
"""For code that runs in a process of its own: the most memory that it ever had."""


@dataclass(slots=True)
class Measurement:
    """What one module of bench/ found out."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    """By goal id."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Title → rows; every row has the same keys."""
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reader of the JSON may want: seeds, sizes, single repeats."""


def facts() -> dict[str, Any]:
    """On what it was measured: versions, processor, commit, time."""
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": num_cores(),
        "system": platform.platform(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    )
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(measurement: Measurement, *, seconds: float) -> Path:
    """Put bench/results/<name>.json down."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{measurement.name}.json"
    data = {
        "name": measurement.name,
        "figures": measurement.figures,
        "tables": measurement.tables,
        "details": measurement.details,
        "seconds": round(seconds, 1),
        "facts": facts(),
    }
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def interleaved(parts: Mapping[str, Callable[[], float]], *, repeats: int, most: int | None = None) -> dict[str, list[float]]:
    """Call every part in turn, `repeats` times over, and return what each gave; "others" is the share that other processes took.

    Turns that others disturbed are made again, up to `most` turns in all, and left out when at least three calm ones remain.
    """
    turns: list[dict[str, float]] = []
    calm: list[dict[str, float]] = []
    while len(turns) < repeats or (len(calm) < repeats and len(turns) < (most or repeats)):
        before = busy_elsewhere()
        turn = {name: part() for name, part in parts.items()}
        turn["others"] = _share(before, busy_elsewhere())
        turns.append(turn)
        if turn["others"] <= _CALM:
            calm.append(turn)
    kept = calm if len(calm) >= min(_FEWEST_CALM, repeats) else turns
    return {name: [turn[name] for turn in kept] for name in kept[0]}


def busy_elsewhere() -> tuple[float, float]:
    """(now, CPU seconds that everything but this process and its ended children has used on the machine), where the system tells."""
    path = Path("/proc/stat")
    if not path.exists():
        return time.monotonic(), 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, path.read_text().split("\n", 1)[0].split()[1:9])
    total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), total - _own_seconds()


def _own_seconds() -> float:
    """CPU seconds of this process, its living descendants and its ended children."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(_seconds_of(pid) for pid in list_descendants(os.getpid()))


def list_descendants(pid: int) -> list[int]:
    """Process ids of a process's children, their children, and so on."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        path = Path(f"/proc/{waiting.pop()}/task")
        try:
            for task in path.iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                waiting += children
        except OSError:
            # It has ended since.
            continue
    return found


def _seconds_of(pid: int) -> float:
    return cpu_seconds(pid) or 0.0


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds of a process and its ended children; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _share(before: tuple[float, float], after: tuple[float, float]) -> float:
    return max(0.0, (after[1] - before[1]) / max(after[0] - before[0], 1e-9) / num_cores())


def seconds_per_call(work: Callable[[], Any], *, at_least: float) -> float:
    """Mean seconds of `work()`, called again and again for `at_least` seconds."""
    calls = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < at_least or calls == 0:
        work()
        calls += 1
    return elapsed / calls


def typical_seconds(turns: Mapping[str, Sequence[float]], name: str) -> float:
    """The median of calm turns. On a disturbed machine the lowest: what others take of the time is not the program's."""
    disturbed = statistics.median(turns["others"]) > _CALM
    return _round(min(turns[name]) if disturbed else statistics.median(turns[name]))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range, rounded for people."""
    return {"median": _round(statistics.median(values)), "lowest": _round(min(values)), "highest": _round(max(values))}


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a Markdown table with equal columns."""
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    print(f"\n{title}\n")
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
