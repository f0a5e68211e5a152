"""The one checker of recipe annotations, and the way from JSON to dataclasses, for plain Python use.

The API does the same through Pydantic from the same annotations; a test holds the two against each other.
"""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval, Len

from ml.errors import RecipeError

T = TypeVar("T")


_known_hints: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _known_hints:
        hints = get_type_hints(cls, include_extras=True)
        _known_hints[cls] = {f.name: hints[f.name] for f in fields(cls)}
    return _known_hints[cls]


def check_annotations(value: Any) -> None:
    """Raise RecipeError for the first field of the dataclass `value` that its annotation does not allow."""
    for name, hint in _hints(type(value)).items():
        problem = _problem(getattr(value, name), hint)
        if problem:
            raise RecipeError(f"{name} {problem}", pointer=f"/{name}")


def _problem(value: Any, hint: Any) -> str | None:
    """Say why `value` does not fit `hint`; None when it does."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *rules = get_args(hint)
        return _problem(value, inner) or next(filter(None, (_broken_rule(value, rule) for rule in rules)), None)
    if origin in (Union, types.UnionType):
        problems = [_problem(value, option) for option in get_args(hint)]
        return None if None in problems else " or ".join(p for p in problems if p and not p.endswith("must be null"))
    if origin is Literal:
        return None if value in get_args(hint) and type(value) is str else f"{value!r} must be one of {', '.join(get_args(hint))}"
    if hint is type(None):
        return None if value is None else f"{value!r} must be null"
    if origin is tuple:
        return _tuple_problem(value, get_args(hint))
    if origin is dict:
        return _dict_problem(value, *get_args(hint))
    return _scalar_problem(value, hint)


def _scalar_problem(value: Any, hint: type) -> str | None:
    if is_dataclass(hint):
        return None if isinstance(value, hint) else f"{value!r} must be a {hint.__name__}"
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{value!r} must be a number"
        return None if math.isfinite(value) else f"{value!r} must be a finite number"
    if hint is int and isinstance(value, bool):
        return f"{value!r} must be an integer"
    words = {int: "an integer", str: "a string", bool: "true or false"}
    return None if isinstance(value, hint) else f"{value!r} must be {words[hint]}"


def _tuple_problem(value: Any, args: tuple[Any, ...]) -> str | None:
    if not isinstance(value, tuple):
        return f"{value!r} must be a list"
    items = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(items) != len(value):
        return f"{value!r} must have {len(items)} items"
    return next((f"item {i} {p}" for i, (v, h) in enumerate(zip(value, items, strict=True)) if (p := _problem(v, h))), None)


def _dict_problem(value: Any, key_hint: Any, value_hint: Any) -> str | None:
    if not isinstance(value, dict):
        return f"{value!r} must be an object"
    return next((f"key {k!r}: {p}" for k, v in value.items() if (p := _problem(k, key_hint) or _problem(v, value_hint))), None)


def _broken_rule(value: Any, rule: Any) -> str | None:
    if isinstance(rule, Interval):
        low = (rule.ge is None or value >= rule.ge) and (rule.gt is None or value > rule.gt)
        high = (rule.le is None or value <= rule.le) and (rule.lt is None or value < rule.lt)
        return None if low and high else f"{value!r} must be {_interval(rule)}"
    if isinstance(rule, Len):
        fits = rule.min_length <= len(value) and (rule.max_length is None or len(value) <= rule.max_length)
        return None if fits else f"has length {len(value)}, must have {rule.min_length} to {rule.max_length}"
    return None


def _interval(rule: Interval) -> str:
    bounds = ((rule.ge, "at least"), (rule.gt, "above"), (rule.le, "at most"), (rule.lt, "below"))
    return " and ".join(f"{word} {bound}" for bound, word in bounds if bound is not None)


def build(cls: type[T], data: Any, pointer: str = "") -> T:
    """Make the recipe dataclass `cls` from decoded JSON; RecipeError's pointer names the field that is wrong."""
    if not isinstance(data, dict):
        raise RecipeError(f"{pointer or 'the recipe'} must be an object, got {data!r}", pointer=pointer)
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            deeper = [f"{pointer}{place}" for place in _places_of(key, cls)]
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(hints)}"
            hint = f"; there is {' and '.join(deeper[:4])}" if deeper else hint
            raise RecipeError(f"unknown field {pointer}/{key}{hint}", pointer=f"{pointer}/{key}")
    values = {key: _decode(data[key], hints[key], f"{pointer}/{key}") for key in data}
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{pointer}: {error}" if pointer else str(error), pointer=pointer + error.pointer) from None


def _places_of(name: str, cls: type) -> Iterator[str]:
    """Where fields of this name stand below the recipe dataclass `cls`, as JSON pointers; the first item stands for a list."""
    for field_name, hint in _hints(cls).items():
        origin, args = get_origin(hint), get_args(hint)
        inner = get_origin(args[0]) is tuple and args[0] if origin is Annotated else hint
        items = get_args(inner) if get_origin(inner) is tuple else ()
        below = items[0] if items else inner
        if isinstance(below, type) and is_dataclass(below):
            place = f"/{field_name}/0" if items else f"/{field_name}"
            if name in _hints(below):
                yield f"{place}/{name}"
            yield from (f"{place}{rest}" for rest in _places_of(name, below))


def _decode(value: Any, hint: Any, pointer: str) -> Any:
    """Turn JSON's objects and lists into the dataclasses and tuples of `hint`; leave the checking to the dataclass."""
    if get_origin(hint) is Annotated:
        return _decode(value, get_args(hint)[0], pointer)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, pointer)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        item = get_args(hint)[0]
        return tuple(_decode(v, item, f"{pointer}/{i}") for i, v in enumerate(value))
    return value


def from_json(cls: type[T], text: str | bytes) -> T:
    """Parse JSON strictly (no duplicate keys, no NaN or Infinity) into the recipe dataclass `cls`."""
    return build(cls, load_json(text))


def load_json(text: str | bytes) -> Any:
    """Parse JSON; RecipeError, pointing at the place, for a syntax error, a duplicate key, NaN, Infinity or a number beyond all floats."""
    found: list[_Wrong] = []

    def wrong(message: str, key: str | None = None) -> _Wrong:
        found.append(_Wrong(message, key))
        return found[-1]

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                return wrong(f"the key {key!r} stands twice in one object", key)
            seen[key] = value
        return seen

    def finite(digits: str) -> Any:
        number = float(digits)
        return number if math.isfinite(number) else wrong(f"{digits} is larger than any number that can be kept")

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=lambda name: wrong(f"{name} is not a number that JSON knows"),
            parse_float=finite,
        )
        if found:
            raise next(_wrong_places(value, ""))
    except (ValueError, RecursionError) as error:
        # A ValueError also for whole numbers of more digits than Python reads.
        raise RecipeError(f"not valid JSON: {error}") from error
    return value


@dataclass(frozen=True, slots=True)
class _Wrong:
    """Stands in decoded JSON for what cannot be kept, until its place is known."""

    message: str
    key: str | None = None
    """Of a duplicate; the place is then this member of the object."""


def _wrong_places(value: Any, pointer: str) -> Iterator[RecipeError]:
    if isinstance(value, _Wrong):
        yield RecipeError(value.message, pointer=pointer if value.key is None else f"{pointer}/{_escaped(value.key)}")
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _wrong_places(member, f"{pointer}/{_escaped(key)}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _wrong_places(item, f"{pointer}/{index}")


def _escaped(key: str) -> str:
    """RFC 6901."""
    return key.replace("~", "~0").replace("/", "~1")


def to_dict(value: Any) -> dict[str, Any]:
    """The recipe dataclass as JSON-able data, defaults included."""
    return asdict(value)


def to_json(value: Any) -> str:
    """The recipe dataclass as canonical JSON: sorted keys, so equal recipes have equal text (and digests)."""
    return json.dumps(to_dict(value), sort_keys=True, allow_nan=False)
