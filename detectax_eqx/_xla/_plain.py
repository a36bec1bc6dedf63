"""The switch that replaces the tricks of this package with plain operations.

The environment variable `DETECTAX_PLAIN` is read once, at import. `1` turns off all tricks; a list such as
`winograd,rematerialisation` turns off only those, so that each can be measured. Results stay the same.
`plain_operations` does the same for code traced inside its context.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import jax
from jax import lax


Trick = Literal[
    "by_example",
    "chunks",
    "convolution",
    "depthwise",
    "max_pool",
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
    """Parses a value of `DETECTAX_PLAIN` to the set of tricks that it turns off.

    >>> sorted(parse("winograd,pooling"))
    ['pooling', 'winograd']
    """
    if value in ("", "0"):
        return frozenset()
    off = frozenset(TRICKS) if value == "1" else frozenset(value.split(","))
    if unknown := sorted(off.difference(TRICKS)):
        raise ValueError(f"DETECTAX_PLAIN names {unknown[0]!r}; it takes 1, or any of {', '.join(TRICKS)}.")
    return off


# Part of the key of JAX's tracing caches, so that a function traced with a trick is not reused without it.
_off = jax.make_user_context(parse(os.environ.get("DETECTAX_PLAIN", "")))


def is_plain(trick: Trick) -> bool:
    """Whether `trick` is turned off."""
    return trick in _off.value


@contextmanager
def plain_operations(tricks: Collection[Trick] = TRICKS) -> Iterator[None]:
    """Turns `tricks` off, and all others on, for code traced inside the context."""
    with _off(frozenset(tricks)):
        yield


def by_platform(*args: Any, cpu: Callable[..., Any], default: Callable[..., Any], trick: Trick = "platforms") -> Any:
    """Computes `cpu(*args)` on CPU and `default(*args)` elsewhere; both must give the same result.

    The choice is made at lowering, so that one traced program serves all platforms.
    """
    return default(*args) if is_plain(trick) else lax.platform_dependent(*args, cpu=cpu, default=default)
