"""Computing in fewer bits than parameters have."""

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ._norm import FrozenBatchNorm, GroupNorm


def convolution_options() -> dict[str, bool]:
    """Options of XLA that suit a program with convolutions: `jax.jit(f, compiler_options=convolution_options())`.

    On a GPU from Hopper on, XLA lays maps channels last, as its tensor cores want them. In full float32
    (`jax_default_matmul_precision` is "highest") they are of no use, and cuDNN would transpose each convolution's maps
    forth and back: there the options ask for channels first. Elsewhere there are none.

    >>> isinstance(convolution_options(), dict)
    True
    """
    full = jax.config.jax_default_matmul_precision in ("highest", "float32")  # type: ignore[attr-defined]
    return {"xla_gpu_force_conv_nchw": True} if full and jax.default_backend() == "gpu" else {}


def cast(model: PyTree, dtype: DTypeLike) -> PyTree:
    """`model` with its floats in another dtype, to compute in: `cast(model, jnp.bfloat16)`.

    A detector then runs convolutions and matrix products in `dtype`; norms keep their parameters and compute with them
    in float32, as box decoding, IoU, NMS, softmax and losses do anyway. To train so, cast within the loss: parameters,
    gradients and updates stay float32.

    >>> import jax.numpy as jnp
    >>> import jax.random as jr
    >>> from detectax_eqx.nn import Conv2d
    >>> cast(Conv2d(3, 8, 3, key=jr.key(0)), jnp.bfloat16)(jnp.zeros((3, 4, 4), jnp.bfloat16)).dtype
    dtype(bfloat16)
    """

    def convert(leaf: object) -> object:
        return leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf  # type: ignore[attr-defined]

    return jax.tree.map(convert, model, is_leaf=lambda leaf: isinstance(leaf, FrozenBatchNorm | GroupNorm))
