"""One color of functions: FastAPI runs plain handlers in threads; only streams and the predictor's door are async."""

from __future__ import annotations

import ast

from tests.architecture.sources import room_sources

MAY_BE_ASYNC = {
    # Event streams, and answers that wait for one: they sleep most of their time.
    "server.jobs.follow_job",
    "server.runs.read_run_events",
    # The predictor's door counts, queues and refuses without a thread each.
    "server.predict.predict",
    "server.predict.predict_images",
    "server.predict.predict_json",
    # Alive, and able to show its documentation, also while every thread is busy.
    "server.health.get_liveness",
    # Ready, and able to say so, also while the threads wait for a database that says nothing.
    "server.health.get_predictor_readiness",
    "server.docs.go_to_docs",
    "server.docs.get_docs",
    "server.docs.get_docs_asset",
    "server.docs.get_problem",
}
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
    assert asynchronous <= MAY_BE_ASYNC


def test_workers_and_core_are_synchronous() -> None:
    found = [
        f"{source.path}::{name}"
        for source in room_sources("core", "ml", "workers", "migrations")
        for name, node in source.functions
        if isinstance(node, ast.AsyncFunctionDef)
    ]

    assert found == []
