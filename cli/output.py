"""What people and programs get to read: tables and sentences on stdout, or JSON with `--json`; problems always on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """Where a command's answer goes; `as_json` is the global option `--json`."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    @cached_property
    def console(self) -> Console:
        """Rich's console on stdout, opened at the first table: most commands of a program never need it."""
        from rich.console import Console

        # Through a pipe a table must not be cut to 80 columns.
        width = None if sys.stdout.isatty() else 200
        return Console(width=width, highlight=False, soft_wrap=True)

    def result(self, value: Any, text: str) -> None:
        """A command's answer: `value` for programs, `text` for people."""
        print(_dumps(value) if self.as_json else text)

    def line(self, value: Mapping[str, Any]) -> None:
        """One object a line, at once: the stream that a program reads."""
        print(json.dumps(value, ensure_ascii=False), flush=True)

    def say(self, text: str) -> None:
        """Tell a person something; a program asked for nothing of the kind."""
        if not self.as_json:
            print(text, flush=True)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, title: str | None = None) -> None:
        """Rows as a table; `columns` maps each heading to its key. As JSON: the whole rows."""
        if self.as_json:
            print(_dumps(list(rows)))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for heading in columns:
            table.add_column(heading, no_wrap=True)
        for row in rows:
            table.add_row(*(Text(show(row.get(key))) for key in columns.values()))
        self.console.print(table)
        if not rows:
            print("(none)")

    def error(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        """One or two lines on stderr; with `--json` an object."""
        if self.as_json:
            print(_dumps({"error": {"message": message, **(details or {})}}), file=sys.stderr)
        else:
            print(f"error: {message}", file=sys.stderr)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def show(value: Any) -> str:
    """A cell's text: nothing for None, three decimals, seconds without fractions."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    text = str(value)
    is_moment = len(text) >= 20 and text[4:5] == "-" and text[10:11] == "T"
    return text[:19].replace("T", " ") if is_moment else text


def show_accuracy(measured: Mapping[str, Any] | None) -> str:
    """`97.3 % (94.8–98.6)`: top-1 with its 95 % interval."""
    if not measured or measured.get("top1") is None:
        return "-"
    low, high = measured["interval"]
    return f"{100 * measured['top1']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def show_duration(seconds: float) -> str:
    """`47 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def show_bytes(num_bytes: float) -> str:
    """`640 B`, `12.3 kB`, `1.7 GB`: thousands, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
