"""Arithmetic whose roundings a compiler leaves alone.

Nothing here is for speed, so that `DETECTAX_PLAIN` does not turn it off: results would differ.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded_product(x: Float[Array, "..."], y: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """`x * y`, rounded before anything is added to it.

    Compilers contract `a + b - x * y` to a fused multiply-add, which skips a rounding: an IoU then differs in its last
    bit from the same IoU computed elsewhere, and ties and thresholds fall otherwise. A minimum in between prevents
    that.
    """
    return jnp.minimum(x * y, float(jnp.finfo(jnp.float32).max))


def rounded_quotient(x: Float[Array, "..."], divisor: int) -> Float[Array, "..."]:
    """`x / divisor`, correctly rounded.

    Compilers multiply by the rounded reciprocal of a constant instead: 84 pixels in 14 bins are then a little more
    than 6 each, and get 7 samples. So the divisor is made to look as if it depended on `x`.
    """
    return x / jnp.where(jnp.isnan(x), 1, divisor).astype(x.dtype)
