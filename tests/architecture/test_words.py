"""Names that say something, one version, one spelling, and nothing printed by surprise."""

from __future__ import annotations

import ast
import re
import tomllib

from core.version import VERSION
from tests.architecture.sources import REPOSITORY, all_sources, room_sources

SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "base", "manager", "processor", "handler", "stuff"}
# Spellings of the other side of the ocean, and of hurry.
OTHER_SPELLING = re.compile(
    r"(?i)\b(?:(?:colour|behaviour|unlabelled|normalis|initialis|optimis|serialis|favour)\w*|(?:labell|cancell)(?:ed|ing)\b|centre\b)"
)


def test_no_file_and_no_class_has_a_name_that_says_nothing() -> None:
    files = [source.path for source in all_sources() if source.path.rsplit("/", 1)[-1].removesuffix(".py") in SAYS_NOTHING]
    classes = [
        f"{source.path}::{node.name}"
        for source in all_sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and re.search(r"(Utils?|Helpers?|Manager|Processor|Misc)$", node.name)
    ]

    assert files + classes == []


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{source.path}:{node.lineno}"
        for source in room_sources()
        if source.room != "cli" and not source.path.endswith("/__main__.py")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert printing == []


def test_the_version_is_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert project["version"] == VERSION


def test_the_spelling_is_one() -> None:
    documents = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    texts = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in documents}
    texts |= {source.path: source.text for source in room_sources()}

    assert {path: found for path, text in texts.items() if (found := sorted(set(OTHER_SPELLING.findall(text))))} == {}
