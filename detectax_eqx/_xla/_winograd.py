"""3×3 convolution by Winograd's minimal filtering, F(2×2, 3×3) of arXiv:1509.09308: 16 products instead of 36.

A tile of 2×2 outputs sees 4×4 pixels. Pixels, kernel and outputs are transformed, each by a few sums and halves. A tile
then takes one product per position, 16 in all, and all tiles and channels together take 16 matrix products. Rounding
errors stay those of float32: with 256 channels of normal numbers they are a quarter larger than the direct form's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._varying import varying_like


# Tiles that are transformed at a time, so that they stay in the cache: transformed, they are four times as large.
# Half as many where two maps are transformed.
BLOCK_TILES = 1000


# Jitted, as the function below, so that it is traced once per shape and not per layer.
@jax.jit
def convolve_3x3(x: Float[Array, "n h w i"], weight: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """Cross-correlates maps with a kernel, zero-padded by one pixel on all sides."""
    n, height, width, _ = x.shape
    rows, across, starts = _blocks(x.shape, BLOCK_TILES)
    padded = _pad(x, rows * len(starts), across, border=1)
    kernel = _kernel(*jnp.stack(_kernel(*weight.swapaxes(0, 1)), axis=1))  # by rows of the tile

    def some_rows(y, start):
        seen = _seen_by_rows(padded, start, rows, across)
        # Four products in one are faster than one by one, and the program is half as long.
        products = [(s @ k).reshape(4, n, rows, across, -1) for s, k in zip(seen, kernel, strict=True)]
        block = jnp.stack([jnp.stack(_outputs(*row), axis=3) for row in _outputs(*products)], axis=2)
        return lax.dynamic_update_slice_in_dim(y, block.reshape(n, 2 * rows, 2 * across, -1), 2 * start, axis=1), None

    # Filled with a number from the image: XLA would share zeros among maps of equal shape, and keep them throughout.
    y = jnp.full((n, 2 * rows * len(starts), 2 * across, weight.shape[-1]), x[0, 0, 0, 0])
    y, _ = lax.scan(some_rows, varying_like(y, weight), starts)
    return y[:, :height, :width]


@jax.jit
def weight_gradient_3x3(cotangent: Float[Array, "n h w o"], x: Float[Array, "n h w i"]) -> Float[Array, "o i 3 3"]:
    """The gradient of `convolve_3x3` in its kernel: the transposed transforms around the same 16 products."""
    rows, across, starts = _blocks(x.shape, BLOCK_TILES // 2)
    padded = _pad(x, rows * len(starts), across, border=1)
    cotangents = _pad(cotangent, rows * len(starts), across, border=0)

    def add(totals, start):
        block = lax.dynamic_slice_in_dim(cotangents, 2 * start, 2 * rows, axis=1)
        down = jnp.stack(_outputs_transposed(block[:, ::2], block[:, 1::2]))
        given = _tiles(_outputs_transposed(down[..., ::2, :], down[..., 1::2, :]))
        # By columns: by rows, XLA would merge them with the transforms in `convolve_3x3`, and keep those until now.
        seen = _seen_by_columns(padded, start, rows, across)
        product = partial(jnp.einsum, "bto,bti->boi", preferred_element_type=totals[0].dtype)
        return [total + product(g, s) for total, g, s in zip(totals, given, seen, strict=True)], None

    # Sums over many steps are accumulated in float32 or better.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    zeros = varying_like(jnp.zeros((4, cotangent.shape[-1], x.shape[-1]), dtype), cotangent, x)
    totals, _ = lax.scan(add, [zeros] * 4, starts)
    columns = _kernel_transposed(*totals)
    return jnp.stack([jnp.stack(_kernel_transposed(*c), axis=-1) for c in columns], axis=-1).astype(x.dtype)


def _blocks(shape: tuple[int, ...], tiles: int) -> tuple[int, int, Array]:
    """Splits the tile grid into row blocks of about `tiles` tiles.

    Returns rows per block, tiles per row, and the first row of each block.
    """
    n, height, width, _ = shape
    down, across = -(-height // 2), -(-width // 2)
    # `n` is symbolic where a program is exported for any batch size.
    most = min(down, max(1, tiles // (across * (n if isinstance(n, int) else 1))))
    # Down to half as many, if the last block then needs fewer rows of padding.
    rows = min(range(most, most // 2, -1), key=lambda rows: -down % rows)
    return rows, across, jnp.arange(0, down, rows, dtype=jnp.int32)


def _pad(maps: Array, down: int, across: int, *, border: int) -> Array:
    """Pads maps with zeros: a border, and more below and to the right to fill whole tiles."""
    _, height, width, _ = maps.shape
    ends = [(border, border + 2 * count - size) for count, size in ((down, height), (across, width))]
    return jnp.pad(maps, ((0, 0), *ends, (0, 0)))


def _seen_by_rows(padded: Array, start: Array, rows: int, across: int) -> list[Array]:
    """The transformed pixels of some rows of tiles, for each row of a tile: `(4, tiles, channels)`."""
    block = _block(padded, start, rows)
    # Each of the 16 from the image itself: with an intermediate for one axis, large maps take 15 % longer.
    tile = [[block[:, i : i + 2 * rows : 2, j : j + 2 * across : 2] for j in range(4)] for i in range(4)]
    columns = [_pixels(*column) for column in zip(*tile, strict=True)]
    by_rows = [_pixels(*row) for row in zip(*columns, strict=True)]
    return [jnp.stack([part.reshape(-1, part.shape[-1]) for part in row]) for row in by_rows]


def _seen_by_columns(padded: Array, start: Array, rows: int, across: int) -> list[Array]:
    """The same for each column of a tile."""
    block = _block(padded, start, rows)
    down = jnp.stack(_pixels(*(block[:, i : i + 2 * rows : 2] for i in range(4))))
    return _tiles(_pixels(*(down[..., j : j + 2 * across : 2, :] for j in range(4))))


def _tiles(parts: tuple[Array, ...]) -> list[Array]:
    """`(4, n, rows, across, channels)` to `(4, tiles, channels)`, for each part."""
    return [part.reshape(4, -1, part.shape[-1]) for part in parts]


def _block(padded: Array, start: Array, rows: int) -> Array:
    """The pixels that some rows of tiles see."""
    return lax.dynamic_slice_in_dim(padded, 2 * start, 2 * rows + 2, axis=1)


# The transforms of F(2, 3) along one axis, in arXiv:1509.09308 the matrices B transposed, G and A transposed.


def _pixels(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a - c, b + c, c - b, b - d


def _kernel(a: Any, b: Any, c: Any) -> tuple[Any, ...]:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _outputs(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a + b + c, b - c - d


# Their transposes, for the gradient.


def _outputs_transposed(a: Any, b: Any) -> tuple[Any, ...]:
    return a, a + b, a - b, -b


def _kernel_transposed(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d
