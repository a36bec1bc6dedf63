"""Keeping XLA's CPU compiler from taking a computation apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._batching import largest_of_batch


def undivided(function: Callable, *args: Any) -> Any:
    """`function(*args)`, which on a CPU is done at one time, its parts shared with nothing else.

    A barrier would say so, but XLA's CPU compiler drops it before it looks for equal computations and orders them. So
    the function is one side of a condition there, on what is always true of the first number, and under `vmap` of that
    of any example. Elsewhere it is called as it is.
    """

    def cpu(*args):
        number = jax.tree.leaves(args)[0].ravel()[0]
        always = jnp.logical_or(number < 0, ~(number < 0))
        return lax.cond(largest_of_batch(always), function, never, *args)

    def never(*args):
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *args))

    return lax.platform_dependent(*args, cpu=cpu, default=function)
