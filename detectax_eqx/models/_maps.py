"""The cells of maps of several sizes as one sequence, and where they are in the image."""

from collections.abc import Sequence
from itertools import accumulate

import equinox as eqx
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int32

from ..nn import sine_positions
from ..ops import upcast
from ._queries import MARGIN, PROPOSAL_SIDE


class Maps(eqx.Module):
    """Cells of `l` maps, one after another, and where they are.

    - `middles`: that of each cell relative to the image, `xy`. `positions`: embeddings of it and of the level.
    - `valid`: the cells of each map that the image fills. `shares`: the parts of the maps' sides that it fills, `xy`.
    """

    cells: Float[Array, "n c"]
    positions: Float[Array, "n c"]
    middles: Float[Array, "n 2"]
    valid: tuple[Bool[Array, "_ _"], ...]
    shares: Float[Array, "l 2"]

    @property
    def references(self) -> Float[Array, "n l 2"]:
        """The middle of each cell in each of the maps."""
        return self.middles[:, None] * self.shares[None]

    def split(self, cells: Float[Array, "n c"]) -> list[Float[Array, "c _ _"]]:
        """The maps that consist of `cells`."""
        ends = list(accumulate(mask.size for mask in self.valid))
        parts = jnp.split(cells, ends[:-1])
        return [rearrange(x, "(h w) c -> c h w", h=len(mask)) for x, mask in zip(parts, self.valid, strict=True)]

    def proposals(self) -> tuple[Float[Array, "n 4"], Bool[Array, " n"]]:
        """A box `cxcywh` around each cell relative to the image, and which are used: those inside it and not too large.

        As `grid_proposals`, on the part of each map that the image fills.
        """
        sides = [jnp.full(mask.size, PROPOSAL_SIDE * 2**i, self.middles.dtype) for i, mask in enumerate(self.valid)]
        side = jnp.concatenate(sides)[:, None]
        boxes = jnp.concatenate([self.middles, side, side], axis=1)
        filled = jnp.concatenate([mask.reshape(-1) for mask in self.valid])
        return boxes, filled & jnp.all((boxes > MARGIN) & (boxes < 1 - MARGIN), axis=1)


def place(
    levels: Sequence[Float[Array, "c _ _"]],
    canvas: tuple[int, int],
    canvas_size: Int32[Array, " 2"],
    embeddings: Float[Array, "l c"],
) -> Maps:
    """Flattens the maps of an image on a canvas. `embeddings`: of the levels."""
    dtype, channels = upcast(levels[0]).dtype, embeddings.shape[1]
    valid, shares, positions, middles = [], [], [], []
    for x, embedding in zip(levels, embeddings, strict=True):
        grid = (x.shape[1], x.shape[2])
        mask, size = cells_of(canvas, canvas_size, grid)
        at = sine_positions(grid, channels, size=size, centred=True, dtype=dtype).astype(x.dtype)
        sides = size.astype(dtype)
        rows, columns = ((jnp.arange(side, dtype=dtype) + 0.5) / sides[i] for i, side in enumerate(grid))
        valid.append(mask)
        shares.append(sides[::-1] / jnp.array(grid[::-1], dtype))
        positions.append(rearrange(at, "c h w -> (h w) c") + embedding[None])
        middles.append(jnp.stack([jnp.tile(columns, grid[0]), jnp.repeat(rows, grid[1])], axis=1))
    return Maps(
        jnp.concatenate([rearrange(x, "c h w -> (h w) c") for x in levels]),
        jnp.concatenate(positions),
        jnp.concatenate(middles),
        tuple(valid),
        jnp.stack(shares),
    )


def cells_of(
    canvas: tuple[int, int], canvas_size: Int32[Array, " 2"], grid: tuple[int, int]
) -> tuple[Bool[Array, "{grid[0]} {grid[1]}"], Int32[Array, " 2"]]:
    """Which cells of a map hold the image, and `(height, width)` of their rectangle at the top left.

    A cell does if the image has the first of its pixels, as in a nearest-neighbour resize of the image's mask.
    """
    rows, columns = (
        jnp.arange(cells, dtype=jnp.int32) * side // cells < canvas_size[i]
        for i, (side, cells) in enumerate(zip(canvas, grid, strict=True))
    )
    size = jnp.stack([rows.sum(dtype=jnp.int32), columns.sum(dtype=jnp.int32)])
    return rows[:, None] & columns[None, :], size
