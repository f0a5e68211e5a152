"""Identifiers say what they name and sort by when they were made."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.ids import PREFIXES, new_id


def test_ids_sort_by_their_making_even_within_a_millisecond() -> None:
    made = [new_id("job") for _ in range(5000)]

    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_threads_never_make_the_same_id() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_id("run"), range(4000)))

    assert len(set(made)) == len(made)


@pytest.mark.parametrize("kind", PREFIXES)
def test_an_id_tells_its_kind(kind: str) -> None:
    assert re.fullmatch(rf"{PREFIXES[kind]}_[0-9a-hjkmnp-tv-z]{{26}}", new_id(kind))
