"""The code as text and syntax trees, read once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("core", "ml", "server", "workers", "cli", "migrations")
FOLDERS = (*ROOMS, "tests", "bench")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file of the repository."""

    path: str
    """Relative to the repository, with forward slashes."""

    @property
    def room(self) -> str:
        """Its first folder."""
        return self.path.split("/", 1)[0]

    @property
    def module(self) -> str:
        """The dotted name under which it is imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def text(self) -> str:
        return (REPOSITORY / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def functions(self) -> list[tuple[str, Function]]:
        """Every function with its qualified name, nested ones included."""
        return list(_functions(self.tree, ""))

    @cached_property
    def imports(self) -> list[str]:
        """Every dotted name that an import statement in it could bring in: `from a import b` gives `a` and `a.b`."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        return found

    def function_around(self, line: int) -> str:
        """Qualified name of the innermost function that holds the line; `<module>` outside of all."""
        around = [(node.lineno, name) for name, node in self.functions if node.lineno <= line <= (node.end_lineno or node.lineno)]
        return max(around)[1] if around else "<module>"


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{child.name}" if isinstance(child, ast.ClassDef | Function) else ""
        if isinstance(child, Function):
            yield name, child
        yield from _functions(child, f"{name}." if name else prefix)


@lru_cache(maxsize=1)
def all_sources() -> tuple[Source, ...]:
    """Every Python file of the rooms, the tests and the benchmarks."""
    paths = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py") if "__pycache__" not in path.parts)
    return tuple(Source(path.relative_to(REPOSITORY).as_posix()) for path in sorted(paths))


def room_sources(*rooms: str) -> list[Source]:
    """The files of these rooms, all rooms when none is named."""
    return [source for source in all_sources() if source.room in (rooms or ROOMS)]
