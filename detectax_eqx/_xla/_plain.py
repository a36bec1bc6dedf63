"""The switch that replaces the tricks of this package with plain operations.

The environment variable `DETECTAX_PLAIN` is read once, at import. `1` turns every trick off; a list such as
`winograd,rematerialisation` turns those off alone, so that each can be measured. Results stay the same.
`plain_operations` does so for what is traced within it.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import jax
from jax import lax


Trick = Literal[
    "chunks",
    "convolution",
    "max_pool",
    "nonzero",
    "options",
    "platforms",
    "pooling",
    "rematerialisation",
    "stripes",
    "undivided",
    "unvmap",
    "winograd",
]


TRICKS: tuple[Trick, ...] = get_args(Trick)


def parse(value: str) -> frozenset[str]:
    """The tricks that a value of `DETECTAX_PLAIN` turns off.

    >>> sorted(parse("winograd,pooling"))
    ['pooling', 'winograd']
    """
    if value in ("", "0"):
        return frozenset()
    off = frozenset(TRICKS) if value == "1" else frozenset(value.split(","))
    if unknown := sorted(off.difference(TRICKS)):
        raise ValueError(f"DETECTAX_PLAIN names {unknown[0]!r}; it takes 1, or any of {', '.join(TRICKS)}.")
    return off


# A part of the key of every cache of traced functions: what was traced with a trick is not used without it.
_off = jax.make_user_context(parse(os.environ.get("DETECTAX_PLAIN", "")))


def is_plain(trick: Trick) -> bool:
    """Whether `trick` is turned off."""
    return trick in _off.value


@contextmanager
def plain_operations(tricks: Collection[Trick] = TRICKS) -> Iterator[None]:
    """Turns `tricks` off, and all others on, for what is traced within it."""
    with _off(frozenset(tricks)):
        yield


def by_platform(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any], trick: Trick = "platforms") -> Any:
    """`default(*args)`, or on CPU `cpu(*args)`, which computes the same another way.

    The choice is made when a program is lowered, so that one traced program serves every platform.
    """
    return default(*args) if is_plain(trick) else lax.platform_dependent(*args, cpu=cpu, default=default)
