"""Convolution in groups of channels, or with gaps between the taps of its kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._varying import varying_like


def convolve_groups(
    x: Float[Array, "n i h w"],
    weight: Float[Array, "o i_g kh kw"],
    bias: Float[Array, " o"] | None = None,
    *,
    stride: int,
    padding: int,
    groups: int,
    dilation: int,
) -> Float[Array, "n o h2 w2"]:
    """Cross-correlates `n` maps, zero-padded on all sides, group by group, and adds the bias."""
    offset = jnp.zeros((1,), x.dtype) if bias is None else bias
    x, weight, offset = varying_like((x, weight, offset))
    y = lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        ((padding, padding),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
    )
    return y if bias is None else y + offset.astype(y.dtype)[None, :, None, None]
