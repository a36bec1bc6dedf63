"""Computation in a lower precision than that of the parameters."""

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._norm import FrozenBatchNorm, GroupNorm, LayerNorm, LayerNorm2d


NORMS = FrozenBatchNorm | GroupNorm | LayerNorm | LayerNorm2d


def cast(model: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point arrays of a model to `dtype`, as in `cast(model, jnp.bfloat16)`.

    A detector then runs its convolutions and matrix products in `dtype`. Norms keep their parameters and compute in
    float32, as do box decoding, IoU, NMS, softmax and losses. For mixed-precision training, cast inside the loss
    function, so that parameters, gradients and updates stay float32.

    >>> import jax.numpy as jnp
    >>> import jax.random as jr
    >>> from detectax_eqx.nn import Conv2d
    >>> cast(Conv2d(3, 8, 3, key=jr.key(0)), jnp.bfloat16)(jnp.zeros((3, 4, 4), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """

    def convert(leaf: object) -> object:
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf  # type: ignore[attr-defined]

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, NORMS))
