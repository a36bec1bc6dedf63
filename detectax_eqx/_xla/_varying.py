"""Types of arrays under `shard_map`."""

import jax
from jax import lax
from jaxtyping import Array, PyTree


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
