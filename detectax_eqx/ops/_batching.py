"""Control flow under `vmap` and `shard_map`."""

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, PyTree


@custom_vmap
def largest_of_batch(count: Int[Array, ""] | Bool[Array, ""]) -> Int[Array, ""] | Bool[Array, ""]:
    """`count`, not negative, or under `vmap` the largest of the batch: for a loop's bound or a condition.

    Were it not common, `vmap` would run both branches of the condition, and copy the loop's whole carry at every step.
    """
    return count


@largest_of_batch.def_vmap
def _(axis_size, in_batched, count):
    return largest_of_batch(count.max(initial=0)), False


def varying_like(tree: PyTree, *others: PyTree) -> PyTree:
    """`tree`, marked as varying over every mesh axis that an array of it or of `others` varies over.

    Under `jax.shard_map`, the type of an array says over which axes of the mesh its values may differ between devices,
    and a loop's carry must keep its type. A carry that starts from a constant varies over none, until it takes on what
    the step computes from the arguments. Outside `shard_map` this does nothing.
    """
    axes = frozenset[str]().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves((tree, others))))

    def mark(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _varying_axes(leaf: Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]
