"""Scheduling units: computations that XLA's CPU compiler may not take apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._plain import by_platform
from ._unvmap import unvmap_max


def undivided(function: Callable, *args: Any) -> Any:
    """`function(*args)`, which runs as one scheduling unit on CPU: XLA may neither merge nor reorder its parts.

    An `optimization_barrier` does not do that: XLA's CPU compiler drops it before common-subexpression elimination and
    scheduling. So the function is one branch of a condition, on what is always true of the first number, and under
    `vmap` on that of any example. On other platforms it is called directly.
    """

    def cpu(*args):
        number = jax.tree.leaves(args)[0].ravel()[0]
        always = jnp.logical_or(number < 0, ~(number < 0))
        return lax.cond(unvmap_max(always), function, never, *args)

    def never(*args):
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *args))

    return by_platform(*args, cpu=cpu, default=function, trick="undivided")
