"""One color of functions: FastAPI runs plain handlers in threads; only streams and the predictor's door are async."""

from __future__ import annotations

import ast

from tests.architecture.sources import room_sources

MAY_BE_ASYNC = {"server.events", "server.jobs", "server.runs", "server.progress", "server.predictions", "server.serving"}
VERBS = {"get", "post", "put", "patch", "delete", "head"}


def handlers() -> list[tuple[str, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Module, name and definition of every function that a router's decorator makes a route."""
    return [
        (source.module, name, node)
        for source in room_sources("server")
        for name, node in source.functions
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute) and decorator.func.attr in VERBS
    ]


def test_only_streams_and_the_predictors_door_are_async() -> None:
    found = handlers()
    asynchronous = {f"{module}.{name}" for module, name, node in found if isinstance(node, ast.AsyncFunctionDef)}

    assert found
    assert asynchronous == set()


def test_workers_and_core_are_synchronous() -> None:
    found = [
        f"{source.path}::{name}"
        for source in room_sources("core", "ml", "workers", "migrations")
        for name, node in source.functions
        if isinstance(node, ast.AsyncFunctionDef)
    ]

    assert found == []
