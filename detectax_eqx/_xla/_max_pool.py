"""Max pooling as maxima of shifted maps."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._plain import is_plain


def max_pool(x: Float[Array, "c h w"], *, kernel_size: int, stride: int, padding: int) -> Float[Array, "c h2 w2"]:
    """Computes the maximum of each window; padding is never the maximum.

    Among equal values, the first gets the gradient, as with XLA's `reduce_window`, whose gradient
    (`select_and_scatter`) takes three times as long on CPU.
    """
    if is_plain("max_pool"):
        return _by_reduce_window(x, kernel_size, stride, padding)
    # Over columns first, then over rows: (c, h, w) -> (c, h, w2) -> (c, h2, w2).
    x = jnp.pad(x, ((0, 0), *((padding, padding),) * 2), constant_values=-jnp.inf)
    for axis in (2, 1):
        steps = (x.shape[axis] - kernel_size) // stride
        shifted = [lax.slice_in_dim(x, i, i + steps * stride + 1, stride, axis) for i in range(kernel_size)]
        x = reduce(_first_maximum, shifted)
    return x


def _first_maximum(a: Float[Array, "*s"], b: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def _by_reduce_window(x, kernel_size, stride, padding):
    window, strides, pads = (1, *(kernel_size,) * 2), (1, *(stride,) * 2), ((0, 0), *((padding, padding),) * 2)
    return lax.reduce_window(x, np.array(-np.inf, x.dtype), lax.max, window, strides, pads)
