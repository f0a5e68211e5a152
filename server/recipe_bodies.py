"""Parts of recipes in request bodies: any subset of fields, checked by ml itself, shown in the documentation as ml's dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ml.errors import RecipeError
from ml.recipes import merge_config
from ml.validation import build, to_dict
from server.errors import Problem, to_problem

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class ShownAs:
    """Annotation of a free-form field: its schema is that of an ml dataclass, whose fields all have defaults."""

    config: Any

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(self.config).core_schema)


def build_part(config: type[Config], overrides: Mapping[str, Any] | None, *, base: Config, pointer: str) -> Config:
    """`base` with the partial JSON laid over it; a Problem whose pointer begins with `pointer` when that is no valid config."""
    try:
        return build(config, merge_config(to_dict(base), overrides or {}))
    except RecipeError as error:
        raise repointed(error, pointer) from error


def repointed(error: RecipeError, pointer: str) -> Problem:
    """The problem of a recipe error whose field stands at `pointer` in this body instead of at /recipe."""
    problem = to_problem(error)
    for found in problem.errors:
        found["pointer"] = pointer + error.pointer
    return problem
