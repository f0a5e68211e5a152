"""Identifiers that say what they name and sort by when they were made.

`<prefix>_<26 characters>`: 48 bits of milliseconds and 80 random bits in Crockford's base 32, as in ULID. Two made in one
millisecond by one process still sort by order of making: the random part is then counted up.
"""

from __future__ import annotations

import secrets
import threading
import time

from core.errors import NotFound

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
PREFIXES = {
    "dataset": "ds",
    "dataset_version": "dsv",
    "run": "run",
    "iteration": "it",
    "job": "job",
    "generation": "gen",
    "pseudo_label_set": "pls",
    "promotion": "pro",
    "api_key": "key",
    "worker": "wkr",
    "request": "req",
}
_NOUNS = {prefix: kind.replace("_", " ").replace("pseudo ", "pseudo-").replace("api", "API") for kind, prefix in PREFIXES.items()}
_lock = threading.Lock()
_last = 0


def new_id(kind: str) -> str:
    """Make an identifier for a row of `kind`, one of PREFIXES."""
    global _last
    with _lock:
        value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
        # Within one millisecond, and after a clock that stepped back, go on from the last one.
        if value >> 80 <= _last >> 80:
            value = _last + 1 + secrets.randbits(32)
        _last = value
    digits = [_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{PREFIXES[kind]}_{''.join(digits)}"


def absent(noun: str, identity: str) -> NotFound:
    """The refusal of an id or a name that stands for nothing; an id of something else is told as such."""
    prefix, _, rest = identity.partition("_")
    other = _NOUNS.get(prefix) if len(rest) == 26 else None
    hint = "" if other in (None, noun) else f": that is the id of {'an' if other[0] in 'Aai' else 'a'} {other}"
    return NotFound(f"there is no {noun} {identity!r}{hint}")
