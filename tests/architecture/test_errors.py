"""The trees of refusals are complete, each class has its HTTP row, and nothing is swallowed."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest

import core.errors
import ml.errors
from server.errors import PROBLEMS
from tests.architecture.sources import room_sources

# The server's last resort, and the attempt's outermost frame on both ends of its pipe: in the child, and in the slot that follows it.
MAY_CATCH_EVERYTHING = {
    "server/frame.py::RequestFrame.__call__",
    "workers/attempt.py::Attempt._do",
    "workers/slots.py::Slot._run_job",
}


def classes_of(module: ModuleType) -> list[type[Exception]]:
    return [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]


@pytest.mark.parametrize("module", [core.errors, ml.errors])
def test_every_error_class_has_its_row_in_the_http_table(module: ModuleType) -> None:
    assert [cls.__name__ for cls in classes_of(module) if cls not in PROBLEMS] == []


def test_a_row_is_a_client_or_server_status_and_a_lasting_code() -> None:
    for status, code in PROBLEMS.values():
        assert 400 <= status <= 599
        assert code == code.lower()
        assert code.replace("_", "").isalnum()


@pytest.mark.parametrize("module", [core.errors, ml.errors])
def test_the_tree_in_the_docstring_names_every_class_below_its_parent(module: ModuleType) -> None:
    tree = {line.strip("│├└─ ").split(" ", 1)[0]: len(line) - len(line.lstrip("│├└─ ")) for line in (module.__doc__ or "").splitlines()}

    for cls in classes_of(module):
        assert cls.__name__ in tree
        parent = cls.__mro__[1]
        if parent is not Exception:
            assert tree[cls.__name__] == tree[parent.__name__] + 4


def catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in kinds)


def test_three_places_catch_everything_and_no_other_swallows() -> None:
    swallowing = set()
    for source in room_sources():
        for node in ast.walk(source.tree):
            # A handler that ends by raising cleans up and passes on.
            if isinstance(node, ast.ExceptHandler) and catches_everything(node) and not isinstance(node.body[-1], ast.Raise):
                swallowing.add(f"{source.path}::{source.function_around(node.lineno)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                names = {ast.unparse(argument) for argument in node.args}
                if names & {"Exception", "BaseException"}:
                    swallowing.add(f"{source.path}::{source.function_around(node.lineno)}")

    assert swallowing == MAY_CATCH_EVERYTHING
