"""Times against progress, as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.simulation.story import WORK, Story

_BINS = 40
_MOST_POINTS = 1500


def draw(stories: list[Story], directory: Path) -> list[Path]:
    """Controller passes and workers' writes of every size, and the reads of the largest."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {"passes": _passes(stories), "writes": _writes(stories), "reads": _reads(stories[-1])}
    paths = []
    for name, figure in pictures.items():
        path = directory / f"simulate-{name}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None})
        paths.append(path)
    return paths


def _figure(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(1.0 + 5.2 * columns, 3.6), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_xlabel("shards labeled, % of all")
        axis.set_ylabel("ms")
        axis.set_yscale("log")
        axis.grid(visible=True, alpha=0.3)
    return figure, axes


def _points(story: Story, times: Iterable[tuple[float, float]]) -> tuple[Any, Any]:
    begun, ended = story.labeling()
    kept = [(at, seconds) for at, seconds in times if begun <= at <= ended]
    seconds = np.array([value for _, value in kept])
    return 100 * np.asarray(story.share(at for at, _ in kept)), 1000 * seconds


def _line(x: Any, y: Any, share: float) -> tuple[Any, Any]:
    """This percentile of y in bins of x that hold anything."""
    bins = np.minimum((x * _BINS / 100).astype(int), _BINS - 1)
    filled = [number for number in range(_BINS) if (bins == number).any()]
    return [(number + 0.5) * 100 / _BINS for number in filled], [np.percentile(y[bins == number], share) for number in filled]


def _passes(stories: list[Story]) -> Figure:
    figure, (left, right) = _figure(2)
    left.set_title("Controller in a turn of housekeeping")
    right.set_title("What follows a shard's end")
    for number, story in enumerate(stories):
        for axis, times in ((left, story.controller()), (right, story.times("follow"))):
            x, y = _points(story, times)
            step = max(1, len(x) // _MOST_POINTS)
            axis.plot(x[::step], y[::step], ".", color=f"C{number}", markersize=2, alpha=0.35, rasterized=True)
            axis.plot(*_line(x, y, 50), color=f"C{number}", label=f"{_size(story)}, median")
    left.axhline(1000, color="black", linestyle=":", label="most that a pass may take")
    left.legend(loc="best", fontsize="small")
    return figure


def _size(story: Story) -> str:
    return f"{story.plan.shards:,} shards".replace(",", " ")


def _writes(stories: list[Story]) -> Figure:
    figure, (axis,) = _figure(1)
    axis.set_title("What workers ask of the database, medians")
    for number, name in enumerate(WORK):
        for story, style in zip(reversed(stories), ("-", "--", ":"), strict=False):
            label = f"{name}, {_size(story)}"
            axis.plot(*_line(*_points(story, story.times(name)), 50), style, color=f"C{number}", label=label)
    axis.legend(fontsize="x-small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _reads(story: Story) -> Figure:
    figure, (left, right) = _figure(2)
    times = [(at, seconds) for _, at, seconds in story.reads.times]
    left.set_title(f"API reads, {story.plan.workers} workers at work")
    x, y = _points(story, times)
    step = max(1, len(x) // _MOST_POINTS)
    left.plot(x[::step], y[::step], ".", color="C0", markersize=2, alpha=0.35, rasterized=True)
    for share, style in ((50, "-"), (99, "--")):
        left.plot(*_line(x, y, share), style, color="C0", label="median" if share == 50 else "99th percentile")
    left.axhline(50, color="black", linestyle=":", label="most that the 99th percentile may be")
    if story.calm[0]:
        left.axvline(100 * float(story.share([story.calm[0]])[0]), color="C2", alpha=0.6, label="here the workers paused")
    left.legend(loc="best", fontsize="small")
    right.set_title("Medians by what is read")
    busiest = sorted({name for name, _, _ in story.reads.times})
    for number, name in enumerate(busiest):
        of_path = [(at, seconds) for path, at, seconds in story.reads.times if path == name]
        if len(of_path) > 1:
            style = "-" if number < 10 else "--"
            right.plot(*_line(*_points(story, of_path), 50), style, color=f"C{number % 10}", label=name, linewidth=1)
    right.legend(fontsize="x-small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure
