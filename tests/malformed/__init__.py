"""Generated malformed input: each file makes the cases of one kind of input."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Something wrong, and what a user then does.

    - `make(folder)`: makes the files in an empty folder and returns a call that uses them.
    - `words`: what the message has to say besides, a value for instance.
    - `check(result)`: where the call returns, asserts that nothing in its result is wrong, and says `"repaired"`, where
      it was counted, or `"harmless"`. Without it, the call has to refuse.
    """

    name: str
    make: Callable[[Any], Callable[[], Any]]
    words: tuple[str, ...] = ()
    check: Callable[[Any], str] | None = None


def damage(content: bytes, rng, *, flips: int, cuts: int):
    """`(what, damaged content)`: single flipped bits at random places, and ends cut off, at both extremes too."""
    for position in rng.choice(len(content), min(flips, len(content)), replace=False).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        yield f"bit flipped at {position}", bytes(flipped)
    for length in sorted({0, 1, len(content) - 1, *rng.integers(0, len(content), cuts).tolist()}):
        yield f"cut to {length}", content[:length]
