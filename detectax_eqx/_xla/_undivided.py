"""Scheduling units: computations that XLA's CPU compiler must not split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._plain import by_platform
from ._unvmap import unvmap_max


def undivided(function: Callable, *args: Any) -> Any:
    """Computes `function(*args)` as one scheduling unit on CPU: XLA can neither merge nor reorder its parts.

    An `optimization_barrier` is not enough, because XLA's CPU compiler drops it before common-subexpression elimination
    and scheduling. The function is therefore a branch of a condition that is always true but depends on the first
    number of `args`; under `vmap`, it is true if it holds for any example. On other platforms the function is called
    directly.
    """

    def cpu(*args):
        number = jax.tree.leaves(args)[0].ravel()[0]
        negative = number < jnp.zeros_like(number)
        always = jnp.logical_or(negative, ~negative)
        return lax.cond(unvmap_max(always), function, never, *args)

    def never(*args):
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *args))

    return by_platform(*args, cpu=cpu, default=function, trick="undivided")
