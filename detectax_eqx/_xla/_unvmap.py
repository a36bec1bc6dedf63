"""Control flow that stays common to a batch."""

from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int

from ._plain import is_plain


def unvmap_max(x: Int[Array, ""] | Bool[Array, ""]) -> Int[Array, ""] | Bool[Array, ""]:
    """`x`, not negative, or under `vmap` the maximum of the batch: a loop's bound or a condition.

    With a value per example instead, `vmap` runs both branches of a condition, and selects the whole carry of a loop in
    every iteration.

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
