"""Arithmetic whose rounding compilers do not change.

This is needed for equal results, not for speed, so `DETECTAX_PLAIN` does not turn it off.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded_product(x: Float[Array, "..."], y: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """Computes `x * y`, rounded before anything is added to it.

    Compilers contract `a + b - x * y` to a fused multiply-add, which skips a rounding. An IoU then differs in its last
    bit from the same IoU computed elsewhere, which changes the outcome of ties and thresholds. Taking a minimum of the
    product prevents the contraction.
    """
    return jnp.minimum(x * y, float(jnp.finfo(jnp.float32).max))


def rounded_quotient(x: Float[Array, "..."], divisor: int) -> Float[Array, "..."]:
    """Computes `x / divisor`, correctly rounded.

    Compilers replace division by a constant with multiplication by its rounded reciprocal. For 84 pixels in 14 bins,
    each bin then has slightly more than 6 pixels and gets 7 samples. The divisor is therefore made to depend on `x`.
    """
    return x / jnp.where(jnp.isnan(x), 1, divisor).astype(x.dtype)
