"""3×3 convolution by Winograd's minimal filtering, F(2×2, 3×3) of arXiv:1509.09308: 16 products instead of 36.

A tile of 2×2 outputs depends on 4×4 pixels. Pixels, kernel and outputs are transformed, each by a few sums and halves.
A tile then needs one product per position, 16 in all, which is 16 matrix products over all tiles and channels.
Rounding errors remain those of float32: with 256 channels of normally distributed numbers they are a quarter larger
than those of the direct form.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._varying import varying_like


# Tiles transformed per block, so that they stay in cache; the transform makes them four times as large. Half as many if
# two maps are transformed.
BLOCK_TILES = 1000


# This and the function below are jitted so that they are traced once per shape rather than once per layer.
@jax.jit
def convolve_3x3(x: Float[Array, "n h w i"], weight: Float[Array, "3 3 i o"]) -> Float[Array, "n h w o"]:
    """Cross-correlates maps, zero-padded by one pixel on all sides, with a kernel."""
    n, height, width, _ = x.shape
    rows, across, starts = _blocks(x.shape, BLOCK_TILES)
    padded = _pad(x, rows * len(starts), across, border=1)
    kernel = _transform_kernel(*jnp.stack(_transform_kernel(*weight.swapaxes(0, 1)), axis=1))  # (4, i, o) per tile row

    def add_rows(y, start):
        pixels = _pixels_by_row(padded, start, rows, across)
        # One batched product per tile row is faster than four separate ones, and halves the length of the program.
        products = [(p @ k).reshape(4, n, rows, across, -1) for p, k in zip(pixels, kernel, strict=True)]
        block = jnp.stack(
            [jnp.stack(_transform_outputs(*row), axis=3) for row in _transform_outputs(*products)], axis=2
        )  # (n, rows, 2, across, 2, o)
        return lax.dynamic_update_slice_in_dim(y, block.reshape(n, 2 * rows, 2 * across, -1), 2 * start, axis=1), None

    # Filled with a number from the image: XLA would share zeros between maps of equal shape and keep them throughout.
    y = jnp.full((n, 2 * rows * len(starts), 2 * across, weight.shape[-1]), x[0, 0, 0, 0])
    y, _ = lax.scan(add_rows, varying_like(y, weight), starts)
    return y[:, :height, :width]


@jax.jit
def weight_gradient_3x3(cotangent: Float[Array, "n h w o"], x: Float[Array, "n h w i"]) -> Float[Array, "o i 3 3"]:
    """Computes the gradient of `convolve_3x3` with respect to its kernel, by the transposed transforms."""
    rows, across, starts = _blocks(x.shape, BLOCK_TILES // 2)
    padded = _pad(x, rows * len(starts), across, border=1)
    cotangents = _pad(cotangent, rows * len(starts), across, border=0)

    def add(totals, start):
        block = lax.dynamic_slice_in_dim(cotangents, 2 * start, 2 * rows, axis=1)
        down = jnp.stack(_transpose_outputs(block[:, ::2], block[:, 1::2]))
        outputs = _tiles(_transpose_outputs(down[..., ::2, :], down[..., 1::2, :]))
        # By columns: by rows, XLA would merge these transforms with those in `convolve_3x3` and keep their results.
        pixels = _pixels_by_column(padded, start, rows, across)
        product = partial(jnp.einsum, "bto,bti->boi", preferred_element_type=totals[0].dtype)
        return [total + product(o, p) for total, o, p in zip(totals, outputs, pixels, strict=True)], None

    # Sums over many steps are accumulated in at least float32.
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    zeros = varying_like(jnp.zeros((4, cotangent.shape[-1], x.shape[-1]), dtype), cotangent, x)
    totals, _ = lax.scan(add, [zeros] * 4, starts)
    columns = _transpose_kernel(*totals)
    return jnp.stack([jnp.stack(_transpose_kernel(*c), axis=-1) for c in columns], axis=-1).astype(x.dtype)


def _blocks(shape: tuple[int, ...], tiles: int) -> tuple[int, int, Array]:
    """Splits the tile grid into row blocks of about `tiles` tiles.

    Returns rows per block, tiles per row, and the first row of each block.
    """
    n, height, width, _ = shape
    down, across = -(-height // 2), -(-width // 2)
    # `n` is symbolic if a program is exported for any batch size.
    most = min(down, max(1, tiles // (across * (n if isinstance(n, int) else 1))))
    # Choose the row count, between half the maximum and the maximum, that needs the least padding in the last block.
    rows = min(range(most, most // 2, -1), key=lambda rows: -down % rows)
    return rows, across, jnp.arange(0, down, rows, dtype=jnp.int32)


def _pad(maps: Array, down: int, across: int, *, border: int) -> Array:
    """Pads maps with zeros by `border`, and further at the bottom and right to fill whole tiles."""
    _, height, width, _ = maps.shape
    ends = [(border, border + 2 * count - size) for count, size in ((down, height), (across, width))]
    return jnp.pad(maps, ((0, 0), *ends, (0, 0)))


def _pixels_by_row(padded: Array, start: Array, rows: int, across: int) -> list[Array]:
    """Returns the transformed pixels of a block of tiles, for each row of a tile: `(4, tiles, channels)`."""
    block = _block(padded, start, rows)
    # Each of the 16 slices is taken from the image. With an intermediate per axis, large maps take 15 % longer.
    tile = [[block[:, i : i + 2 * rows : 2, j : j + 2 * across : 2] for j in range(4)] for i in range(4)]
    columns = [_transform_pixels(*column) for column in zip(*tile, strict=True)]
    by_rows = [_transform_pixels(*row) for row in zip(*columns, strict=True)]
    return [jnp.stack([part.reshape(-1, part.shape[-1]) for part in row]) for row in by_rows]


def _pixels_by_column(padded: Array, start: Array, rows: int, across: int) -> list[Array]:
    """Returns the transformed pixels of a block of tiles, for each column of a tile: `(4, tiles, channels)`."""
    block = _block(padded, start, rows)
    down = jnp.stack(_transform_pixels(*(block[:, i : i + 2 * rows : 2] for i in range(4))))
    return _tiles(_transform_pixels(*(down[..., j : j + 2 * across : 2, :] for j in range(4))))


def _tiles(parts: tuple[Array, ...]) -> list[Array]:
    """Reshapes each part from `(4, n, rows, across, channels)` to `(4, tiles, channels)`."""
    return [part.reshape(4, -1, part.shape[-1]) for part in parts]


def _block(padded: Array, start: Array, rows: int) -> Array:
    """Slices the pixels that `rows` rows of tiles depend on."""
    return lax.dynamic_slice_in_dim(padded, 2 * start, 2 * rows + 2, axis=1)


# The transforms of F(2, 3) along one axis: the matrices Bᵀ, G and Aᵀ of arXiv:1509.09308.


def _transform_pixels(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a - c, b + c, c - b, b - d


def _transform_kernel(a: Any, b: Any, c: Any) -> tuple[Any, ...]:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _transform_outputs(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a + b + c, b - c - d


# The transposes of the last two, for the gradient.


def _transpose_outputs(a: Any, b: Any) -> tuple[Any, ...]:
    return a, a + b, a - b, -b


def _transpose_kernel(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, ...]:
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d
