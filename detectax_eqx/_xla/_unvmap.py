"""Control flow that is shared by all examples of a batch."""

from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int

from ._plain import is_plain


def unvmap_max(x: Int[Array, ""] | Bool[Array, ""]) -> Int[Array, ""] | Bool[Array, ""]:
    """Returns `x`, or under `vmap` its maximum over the batch, for use as a loop bound or a condition.

    `x` must not be negative. With one value per example instead, `vmap` runs both branches of a condition and applies a
    select to the whole carry of a loop in every iteration.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> jax.vmap(lambda count: unvmap_max(count) + count)(jnp.array([1, 5])).tolist()
    [6, 10]
    """
    return x if is_plain("unvmap") else _maximum(x)


@custom_vmap
def _maximum(x: Int[Array, ""] | Bool[Array, ""]) -> Int[Array, ""] | Bool[Array, ""]:
    return x


@_maximum.def_vmap
def _(axis_size, in_batched, x):
    return _maximum(x.max(initial=0)), False
