"""Sines and cosines of coordinates, as embeddings of positions."""

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from ..ops import upcast


TEMPERATURE = 10_000.0


def sine_embedding(
    position: Float[Array, "*n"], channels: int, *, temperature: float = TEMPERATURE
) -> Float[Array, "*n {channels}"]:
    """Returns sines and cosines of a coordinate, in turn, at wavelengths from 1 to `temperature` (arXiv:1706.03762).

    Channel `2 i` is `sin(2π position / temperature**(2 i / channels))`, and channel `2 i + 1` the cosine of the same.
    Detection transformers embed coordinates that are relative to the image, in 0..1.

    Raises a `ValueError` unless `channels` is even and positive, and `temperature` positive.

    >>> sine_embedding(jnp.zeros(3), 4)[0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"channels must be even and positive, got {channels}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    wide = upcast(position)
    wavelengths = temperature ** (jnp.arange(channels // 2, dtype=wide.dtype) * (2 / channels))
    angles = (2 * math.pi) * wide[..., None] / wavelengths.reshape((1,) * wide.ndim + (-1,))
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # (*n, channels / 2, 2)
    return both.reshape(*position.shape, channels).astype(position.dtype)


def sine_positions(
    grid: tuple[int, int],
    channels: int,
    *,
    size: Int32[Array, " 2"] | None = None,
    centred: bool = False,
    temperature: float = TEMPERATURE,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "{channels} {grid[0]} {grid[1]}"]:
    """Returns the positions of DETR (arXiv:2005.12872): embeddings of the row and of the column of each cell of a grid.

    The first half of channels is that of the row, which is at `(row + 1) / h`, the second that of the column.

    - `size`: `(h, w)` of the part of the grid that an image fills, at its top left; default the whole grid.
    - `centred`: whether rows are at their middles, `(row + 1/2) / h`, as in Deformable DETR (arXiv:2010.04159).

    Raises a `ValueError` unless `channels` is a multiple of 4.

    >>> sine_positions((2, 3), 8).shape
    (8, 2, 3)
    """
    if channels % 4:
        raise ValueError(f"channels must be a multiple of 4, got {channels}.")
    sides = jnp.asarray(grid if size is None else size, dtype)
    # DETR divides by the last row plus 1e-6.
    first = 0.5 if centred else 1.0
    rows, columns = ((jnp.arange(side, dtype=dtype) + first) / (sides[i] + 1e-6) for i, side in enumerate(grid))
    half = channels // 2
    of_rows, of_columns = (sine_embedding(x, half, temperature=temperature).T for x in (rows, columns))
    shape = (half, *grid)
    return jnp.concatenate(
        [jnp.broadcast_to(of_rows[:, :, None], shape), jnp.broadcast_to(of_columns[:, None, :], shape)]
    )
