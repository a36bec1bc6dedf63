"""Bicubic interpolation with torch's kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ._boxes import upcast
from ._sampling import output_bins


# torch's coefficient of cubic convolution (Keys 1981 has -0.5); its kernel reaches two bins to either side.
CUBIC_COEFFICIENT = -0.75
REACH = 2


def resize_bicubic(x: Float[Array, "c h w"], size: tuple[int, int]) -> Float[Array, "c {size[0]} {size[1]}"]:
    """Resizes a map by bicubic interpolation, with values at pixel centres and without antialiasing.

    Equals torch's `interpolate(mode="bicubic", align_corners=False)`, by which the position embeddings of vision
    transformers are resized. `size`: the new `(height, width)`. Differentiable.

    Raises a `ValueError` for a size without pixels.

    >>> resize_bicubic(jnp.array([[[0.0, 1.0]]]), (1, 4))[0, 0].tolist()
    [-0.10546875, 0.2265625, 0.7734375, 1.10546875]
    """
    output_bins(size, "size")
    values = jnp.pad(upcast(x), [(0, 0), (REACH, REACH), (REACH, REACH)], mode="edge")  # (c, h + 4, w + 4)
    rows, columns = (
        cubic_weights(jnp.arange(count, dtype=jnp.int32), jnp.int32(count), side, values.dtype)
        for count, side in zip(size, x.shape[1:], strict=True)
    )
    resized = jnp.einsum("ri,cij->crj", rows, values, precision="highest")
    return jnp.einsum("crj,sj->crs", resized, columns, precision="highest").astype(x.dtype)


def cubic_weights(
    position: Int32[Array, " n"], count: Int32[Array, ""], size: int, dtype: jnp.dtype
) -> Float[Array, "n {size}+4"]:
    """Weight of each of `size` bins, padded by two on each side, at positions of an axis resized to `count` pixels."""
    scale = size / count.astype(dtype)
    centre = (position.astype(dtype) + 0.5) * scale - 0.5  # in bins; the value of bin i is at i
    bins = jnp.arange(-REACH, size + REACH, dtype=dtype)
    return _cubic(centre[:, None] - bins[None])


def _cubic(x: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """The kernel of cubic convolution at a distance of `x` bins (Keys 1981, equation 15)."""
    a, x = CUBIC_COEFFICIENT, jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0))
