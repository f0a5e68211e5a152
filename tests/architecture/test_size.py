"""Files of at most 400 lines, functions of at most 60; what is longer is listed with its size, and the list only shrinks."""

from __future__ import annotations

from tests.architecture.sources import all_sources

FILE_LINES = 400
FUNCTION_LINES = 60

# A number here is the function's size today. Shorter: lower the number, or drop the line at 60. Longer is refused.
LONG_FUNCTIONS = {
    # One migration is one thought, and the first one made every table.
    "migrations/versions/v0001_first_tables.py::upgrade": 287,
}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {source.path: source.text.count("\n") for source in all_sources()}

    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines_and_the_list_of_exceptions_only_shrinks() -> None:
    lengths = {
        f"{source.path}::{name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for source in all_sources()
        for name, node in source.functions
    }

    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == LONG_FUNCTIONS
