"""Control flow that stays common to a batch."""

from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int


@custom_vmap
def largest_of_batch(count: Int[Array, ""] | Bool[Array, ""]) -> Int[Array, ""] | Bool[Array, ""]:
    """`count`, not negative, or under `vmap` the largest of the batch: for a loop's bound or a condition.

    Were it not common, `vmap` would run both branches of the condition, and copy the loop's whole carry at every step.
    """
    return count


@largest_of_batch.def_vmap
def _(axis_size, in_batched, count):
    return largest_of_batch(count.max(initial=0)), False
