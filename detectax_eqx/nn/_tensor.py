"""Tensor parallelism (Megatron-LM, arXiv:1909.08053): layers that are cut over the devices of the mesh axis `tensor`.

The first layer of a pair is cut by outputs, the second by inputs: each device computes a part of the hidden values, and
of the sum over them. A module says in `tensor_axes` along which axis each of its arrays may be cut. Within
`jax.shard_map`, it recognises a piece by its shape.
"""

from typing import TypeVar

import equinox as eqx
import jax
from jax import lax
from jaxtyping import PyTree


TENSOR_AXIS = "tensor"
Tree = TypeVar("Tree", bound=PyTree)


def is_piece(layer: eqx.nn.Linear) -> bool:
    """Whether a layer's weights are those of some of its inputs, so that its outputs are parts of a sum."""
    return layer.weight.shape[1] != layer.in_features


@jax.custom_vjp
def split_from(x: Tree) -> Tree:
    """Returns `x`, from which each device computes another part. Its gradient is the sum of theirs."""
    return x


split_from.defvjp(lambda x: (x, None), lambda _, cotangent: (lax.psum(cotangent, TENSOR_AXIS),))


@jax.custom_vjp
def sum_parts(x: Tree) -> Tree:
    """Sums the parts of all devices. The gradient of the sum is that of each part."""
    return lax.psum(x, TENSOR_AXIS)


sum_parts.defvjp(lambda x: (lax.psum(x, TENSOR_AXIS), None), lambda _, cotangent: (cotangent,))
