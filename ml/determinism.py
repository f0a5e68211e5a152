"""Where randomness comes from: keyed, stateless, the same on every machine and in every process.

A draw is named by a seed and words ("noise", epoch, index ...), never by what was drawn before it. So a resumed training, and
one with another number of workers, sees the same images with the same noise. No torch here: `torch_seed` is a plain integer.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Word = str | int

_NO_COUNT = np.zeros(4, dtype=np.uint64)


def key_of(seed: int, *words: Word) -> int:
    """128 bits that name a draw; other seeds or words give unrelated ones."""
    return int.from_bytes(_hash(seed, words, 16), "little")


def generator_for(seed: int, *words: Word) -> np.random.Generator:
    """A numpy generator for the draw that `words` name."""
    return np.random.Generator(np.random.Philox(key=key_of(seed, *words)))


class ReusedGenerator:
    """`generator_for` five times as fast: the generator that it returns is the same object every time, so the last one ends.

    For loops that draw for one image after another; not for two threads.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def __call__(self, seed: int, *words: Word) -> np.random.Generator:
        key = np.frombuffer(_hash(seed, words, 16), dtype="<u8").astype(np.uint64)
        # The rest of the state stays that of a fresh generator: nothing buffered.
        self._state["state"] = {"counter": _NO_COUNT, "key": key}
        self._bits.state = self._state
        return self._generator


def torch_seed(seed: int, *words: Word) -> int:
    """A seed for `torch.manual_seed`, 0 <= seed < 2**63."""
    return int.from_bytes(_hash(seed, words, 8), "little") >> 1


# Two streams, each on the border of two epochs.
@lru_cache(maxsize=4)
def permutation(num: int, seed: int, epoch: int, stream: str = "") -> npt.NDArray[np.int64]:
    """The order of `num` things in this epoch; read-only, computed once per process and epoch."""
    order = generator_for(seed, "permutation", stream, epoch).permutation(num)
    order.setflags(write=False)
    return order


def keyed_hashes(keys: list[str], seed: int, *words: Word) -> npt.NDArray[np.uint64]:
    """One uniform 64-bit number per key, independent of its place in the list."""
    salt = _hash(seed, words, 16)
    # One C call a key and one join: about a million keys a second.
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _hash(seed: int, words: tuple[Word, ...], num_bytes: int) -> bytes:
    # repr tells 1 from "1" and ("ab", "c") from ("a", "bc").
    return hashlib.blake2b(repr((seed, *words)).encode(), digest_size=num_bytes).digest()
