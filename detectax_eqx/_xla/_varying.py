"""Varying axes of arrays under `shard_map`."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree


def varying_like(tree: PyTree, *others: PyTree) -> PyTree:
    """Marks `tree` as varying over each mesh axis that any array of `tree` or `others` varies over.

    Under `jax.shard_map`, the type of an array includes the mesh axes over which its values may differ between devices,
    and the carry of a loop must keep its type. A constant initial carry varies over no axis, but the carry computed by
    a step from the arguments does. Outside `shard_map` this does nothing.
    """
    axes = frozenset[str]().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves((tree, others))))

    def mark(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


@jax.custom_jvp
def erf(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The error function. A checked `shard_map` rejects the derivative that JAX 0.12 has for it."""
    return lax.erf(x)


erf.defjvps(lambda tangent, _, x: tangent * jnp.exp(-x * x) * (2 / math.sqrt(math.pi)))


def _varying_axes(leaf: Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]
