"""Requests read strictly: a duplicate key, NaN, an infinite number, a broken character or an unknown parameter is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from core.errors import InvalidRequest, UnsupportedMedia
from ml.errors import RecipeError
from ml.validation import load_json


def parse_strictly(body: bytes) -> Any:
    """Decode JSON; InvalidRequest points at what is wrong with it."""
    try:
        value = load_json(body)
        # Escapes such as \ud800 are no characters and cannot be written again.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecipeError as error:
        raise InvalidRequest(str(error), pointer=error.pointer) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON holds a value that cannot be kept: {error}", pointer="") from error
    return value


class _ParsedRequest(Request):
    """A request whose body was read and decoded before."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class StrictRoute(APIRoute):
    """A route that knows its query parameters, and decodes its JSON body strictly before FastAPI sees it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_json = self.body_field is not None and not isinstance(self.body_field.field_info, params.Form)

        known = sorted(_list_query_parameters(self.dependant))

        async def strict(request: Request) -> Response:
            if request.scope["query_string"]:
                _check_query(request.query_params.keys(), known)
            if not takes_json:
                return await handle(request)
            parsed = _ParsedRequest(request.scope, request.receive)
            body = await parsed.body()
            if body:
                _check_content_type(request.headers.get("content-type", ""))
                parsed.parsed = parse_strictly(body)
            return await handle(parsed)

        return strict


def _check_content_type(content_type: str) -> None:
    essence = content_type.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        raise UnsupportedMedia(f"the body must come as application/json, not as {essence or 'nothing declared'}")


def _list_query_parameters(dependant: Dependant) -> set[str]:
    """Names of the query parameters that the route or one of its dependencies reads."""
    found = {field.alias for field in dependant.query_params}
    return found.union(*(_list_query_parameters(one) for one in dependant.dependencies))


def _check_query(given: Iterable[str], known: Sequence[str]) -> None:
    """InvalidRequest for a parameter that would have no effect, with the one that was probably meant."""
    for name in given:
        if name not in known:
            alike = get_close_matches(name, known, n=1)
            hint = f"did you mean {alike[0]}?" if alike else f"known: {', '.join(known)}" if known else "this route has none"
            raise InvalidRequest(f"there is no query parameter {name[:100]!r}; {hint}", parameter=name[:100])
