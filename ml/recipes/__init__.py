"""Presets, and recipes built from them: `build_recipe("digits", {"seed": 3})`. Torch-free, as all of the face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml.config import NetworkConfig, Recipe
from ml.errors import RecipeError
from ml.recipes.architectures import check_architecture
from ml.recipes.paper import paper_recipe
from ml.recipes.photos import digits, photos_224, small_32px
from ml.validation import build, to_dict

PRESETS: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "small-32px": small_32px,
    "photos-224": photos_224,
    **{f"paper-{size}": (lambda size=size: paper_recipe(size)) for size in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2")},  # type: ignore[misc]
}
"""Every preset by name."""


def get_recipe(name: str) -> Recipe:
    """The preset of that name; RecipeError names the known ones."""
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}; known: {', '.join(PRESETS)}", pointer="/preset")
    return PRESETS[name]()


def build_recipe(preset: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The preset (None: all defaults) with `overrides` laid over it, field by field; RecipeError's pointer names what is wrong.

    An item of `students` is laid over the preset's student of that iteration, so `{"students": [{"ratio": 1}]}` changes one number.
    """
    base = to_dict(get_recipe(preset) if preset else Recipe())
    if not isinstance(overrides, Mapping):
        raise RecipeError(f"the recipe must be an object, got {overrides!r}")
    recipe = build(Recipe, _merge(base, overrides))
    _check_architectures(recipe)
    return recipe


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        old = base.get(key)
        if key == "students" and isinstance(value, list | tuple) and isinstance(old, list | tuple):
            merged[key] = [_merge_student(old, index, item) for index, item in enumerate(value)]
        elif key in ("epochs", "steps") and value is not None and {"epochs", "steps"} <= base.keys():
            # Whoever names one of the two drops the preset's other one, unless both are named.
            other = "steps" if key == "epochs" else "epochs"
            merged |= {key: value, other: overrides.get(other)}
        elif isinstance(old, dict) and isinstance(value, Mapping) and key != "options":
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _merge_student(students: list[Any] | tuple[Any, ...], index: int, item: Any) -> Any:
    base = students[min(index, len(students) - 1)]
    return _merge(base, item) if isinstance(item, Mapping) else item


def merge_config(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay partial JSON over a complete config's JSON, with the same rules as `build_recipe`."""
    return _merge(base, overrides)


def _check_architectures(recipe: Recipe) -> None:
    networks = [("/teacher/network", recipe.teacher.network)]
    networks += [(f"/students/{index}/network", student.network) for index, student in enumerate(recipe.students)]
    for pointer, network in networks:
        check_network(network, pointer)


def check_network(network: NetworkConfig, pointer: str) -> None:
    """RecipeError, below `pointer`, unless timm has the architecture and the initial weights can be meant."""
    try:
        check_architecture(network.architecture)
    except RecipeError as error:
        raise type(error)(f"{pointer}: {error}", pointer=pointer + error.pointer, **_without_pointer(error.details)) from None
    problem = None if network.initial_weights is None else weights_problem(network.initial_weights)
    if problem:
        raise RecipeError(f"{pointer}: initial_weights {problem}", pointer=f"{pointer}/initial_weights")


def _without_pointer(details: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in details.items() if name != "pointer"}


def weights_problem(weights: str) -> str | None:
    """Say why `initial_weights` cannot be meant; None when it can."""
    if weights == "teacher":
        return None
    kind, _, rest = weights.partition(":")
    if kind not in ("timm", "local-dir", "generation") or not rest:
        return f"{weights!r} must be 'teacher', 'timm:NAME.TAG', 'local-dir:PATH' or 'generation:ID'"
    if kind == "timm" and not rest.partition(".")[2]:
        return f"{weights!r} names no tag: timm would pick one by itself, for some networks weights trained on 300 million further images"
    return None
