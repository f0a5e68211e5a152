"""Documents that say what is there: links lead somewhere, decisions have living guards, commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cli.main import app
from tests.architecture.sources import REPOSITORY, all_sources

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
DECISIONS = sorted((REPOSITORY / "docs/decisions").glob("*.md"))
VERBS = {"help", "install", "demo", "up", "test", "test-long", "check", "bench", "format", "lock", "clean"}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))

    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


@pytest.mark.parametrize("decision", DECISIONS, ids=relative)
def test_a_decision_has_its_five_parts_and_fits_on_half_a_page(decision: Path) -> None:
    text = decision.read_text(encoding="utf-8")

    assert re.findall(r"^\*\*(\w+)\.\*\*", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences", "Alternatives", "Guard"]
    assert text.startswith(f"# {decision.name[:4]} ")
    assert len(text.splitlines()) <= 45


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(decision.name[:4]) for decision in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("document", [*DECISIONS, REPOSITORY / "ARCHITECTURE.md"], ids=relative)
def test_every_guard_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    tests = {f"{source.path}::{name}" for source in all_sources() for name, _ in source.functions}
    linter = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contracts = {contract["name"] for contract in linter["contracts"]}

    named_tests = set(re.findall(r"`(tests/\S+?::\w+)`", text))
    named_contracts = set(re.findall(r'contract\s+"([^"]+)"', text))

    assert named_tests | named_contracts
    assert named_tests - tests == set()
    assert {" ".join(name.split()) for name in named_contracts} - contracts == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = re.findall(
        r"`((?:core|ml|server|workers|cli|migrations|tests|bench|docs|requirements)/[\w./-]+)(?:::\w+)?`", document.read_text("utf-8")
    )

    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_make_verb_that_a_document_names_exists(document: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`?\bmake ((?:demo|up|test-long|test|check|bench|format|lock|clean|install)\b)", document.read_text("utf-8")))

    assert {verb for verb in VERBS | named if not re.search(rf"^{verb}:", makefile, flags=re.MULTILINE)} == set()


def shell_lines(document: Path) -> list[str]:
    """Commands of the document's shell blocks, one a line, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if shell_lines(document)], ids=relative)
def test_every_noisy_student_command_of_a_document_parses(document: Path) -> None:
    found = [re.match(r"(?:docker compose exec api )?noisy-student (.*)", line) for line in shell_lines(document)]

    for line in [match[1] for match in found if match]:
        # $(…) stands for files that the shell would put there.
        words = shlex.split(re.sub(r"\$\([^)]*\)", "file.jpg", line), comments=True)
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)


def test_files_that_are_not_python_are_packaged() -> None:
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packaged = {path for room, globs in patterns.items() for glob in globs for path in (REPOSITORY / room).glob(glob)}
    wanted = {
        path
        for room in ("core", "ml", "server", "workers", "cli")
        for path in (REPOSITORY / room).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".md"} and not any(part.startswith(".") for part in path.parts)
    }

    assert {relative(path) for path in wanted - packaged} == set()
