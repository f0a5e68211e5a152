"""import-linter's contracts cover every room, every floor and every noun; `make check` runs them."""

from __future__ import annotations

import ast
import tomllib
from typing import Any

from tests.architecture.sources import REPOSITORY, ROOMS, Source, room_sources

CONTRACTS: list[dict[str, Any]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
    "contracts"
]


def test_every_room_stands_in_a_contract() -> None:
    named = {
        module.split(".")[0]
        for contract in CONTRACTS
        for key in ("layers", "modules", "source_modules", "containers")
        for entry in contract.get(key, [])
        for module in entry.split(" | ")
    }

    assert set(ROOMS) <= named


def test_the_floors_of_core_and_ml_are_exhaustive() -> None:
    exhaustive = {container for contract in CONTRACTS if contract.get("exhaustive") for container in contract["containers"]}

    assert exhaustive == {"core", "core.db", "core.storage", "ml", "ml.robustness"}


def test_every_module_with_routes_is_one_of_the_servers_independent_nouns() -> None:
    [nouns] = [set(contract["modules"]) for contract in CONTRACTS if contract["type"] == "independence"]

    assert {source.module for source in room_sources("server") if makes_a_router(source)} == nouns


def makes_a_router(source: Source) -> bool:
    assigned = [node.targets for node in source.tree.body if isinstance(node, ast.Assign)]
    assigned += [[node.target] for node in source.tree.body if isinstance(node, ast.AnnAssign)]
    return any(isinstance(target, ast.Name) and target.id == "router" for targets in assigned for target in targets)


def test_no_contract_ignores_an_import_without_a_reason() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")

    for block in text.split("ignore_imports = [")[1:]:
        assert block.lstrip().startswith("# ")
