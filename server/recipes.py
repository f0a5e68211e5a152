"""The presets, with every knob and its meaning."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel

from core.errors import NotFound
from ml.config import Recipe
from ml.recipes import PRESETS, get_recipe
from ml.validation import to_dict
from server.dependencies import make_router
from server.openapi import problems
from server.pages import Page
from server.recipe_bodies import ShownAs

router: APIRouter = make_router("recipes")


class RecipeView(BaseModel):
    """A preset by name, complete: whatever a run overrides is laid over it field by field."""

    name: str
    # Shown by its schema, built as plain JSON: Pydantic's own serializer of all its dataclasses would cost 0.3 s at every start.
    recipe: Annotated[dict[str, Any], ShownAs(Recipe)]


@router.get("/recipes", summary="List presets")
def list_recipes() -> Page[RecipeView]:
    """All of them on one page; `digits` and `small-32px` train on a CPU."""
    return Page(items=[RecipeView(name=name, recipe=to_dict(make())) for name, make in PRESETS.items()])


@router.get("/recipes/{name}", summary="Read a preset", responses=problems(404))
def read_recipe(name: str) -> RecipeView:
    """Every field with its value; the schema explains each."""
    if name not in PRESETS:
        raise NotFound(f"there is no preset {name!r}; known: {', '.join(PRESETS)}")
    return RecipeView(name=name, recipe=to_dict(get_recipe(name)))
