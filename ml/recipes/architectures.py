"""The networks that timm can build, by name, without timm: the API validates a recipe with this list.

`architectures.txt` is what `timm.list_models()` says, one name a line; `python -m ml.recipes.architectures` writes it anew
after timm was updated, and a test compares the two.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from ml.errors import UnknownArchitecture

LIST = Path(__file__).with_name("architectures.txt")


@cache
def architectures() -> frozenset[str]:
    """Every name that a recipe may use."""
    return frozenset(LIST.read_text(encoding="utf-8").split())


def check_architecture(name: str) -> None:
    """Raise UnknownArchitecture, with the closest known names, unless timm has a network called `name`."""
    if name in architectures():
        return
    plain, _, tag = name.partition(".")
    if plain in architectures():
        message = f'the architecture is {plain!r}; the pretrained tag belongs into initial_weights, as "timm:{plain}.{tag}"'
        raise UnknownArchitecture(message, pointer="/architecture", suggestions=[plain])
    close = difflib.get_close_matches(plain.lower(), architectures(), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else "; ml/recipes/architectures.txt lists all names"
    raise UnknownArchitecture(f"timm has no architecture {name!r}{hint}", pointer="/architecture", suggestions=close)


def _write_list() -> None:
    from ml.models import known_architectures

    LIST.write_text("\n".join(known_architectures()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write_list()
