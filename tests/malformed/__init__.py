"""Generated malformed input: each file generates the cases of one kind of input."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Malformed input, and a call that uses it as a user would.

    - `make(folder)`: writes the files to an empty folder and returns the call that uses them.
    - `words`: what the error message has to contain, a value for instance.
    - `check(result)`: if the call returns, asserts that its result is correct, and returns `"repaired"` if the problem
      was counted, or `"harmless"`. Without `check`, the call has to fail.
    """

    name: str
    make: Callable[[Any], Callable[[], Any]]
    words: tuple[str, ...] = ()
    check: Callable[[Any], str] | None = None


def damage(content: bytes, rng, *, flips: int, cuts: int):
    """Yields `(what, damaged content)`: single bits flipped at random, and ends cut off, including both extremes."""
    for position in rng.choice(len(content), min(flips, len(content)), replace=False).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        yield f"bit flipped at {position}", bytes(flipped)
    for length in sorted({0, 1, len(content) - 1, *rng.integers(0, len(content), cuts).tolist()}):
        yield f"cut to {length}", content[:length]
