"""Windows of a grid of tokens, in which attention stays."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


# Added to the logit of a pair of tokens that are not neighbours in the image. Swin Transformer's value; it is not
# infinite, so that a row of nothing else still has a softmax.
MASKED = -100.0


class Windows(NamedTuple):
    """Square windows of a grid of `(h, w)` tokens. Incomplete windows at the bottom and right are padded with zeros.

    - `grid`: `(h, w)`. `size`: side of a window in tokens; 0 for one window of all tokens, which may then be more than
      those of the grid.
    - `shift`: numbers of tokens by which the grid is rolled up and left before it is cut, so that windows join tokens
      that other windows separate (Swin Transformer, arXiv:2103.14030, section 3.2). What wraps around does not attend
      to its new neighbours, see `mask`.

    >>> windows = Windows(grid=(2, 3), size=2)
    >>> tokens = jnp.arange(6.0)[:, None]
    >>> windows.split(tokens)[..., 0].tolist()
    [[0.0, 1.0, 3.0, 4.0], [2.0, 0.0, 5.0, 0.0]]
    >>> bool((windows.merge(windows.split(tokens)) == tokens).all())
    True
    """

    grid: tuple[int, int]
    size: int = 0
    shift: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """`(height, width)` of a window in tokens."""
        return (self.size, self.size) if self.size else self.grid

    @property
    def _counts(self) -> tuple[int, int]:
        """Number of windows along each side."""
        return -(-self.grid[0] // self.shape[0]), -(-self.grid[1] // self.shape[1])

    def split(self, x: Float[Array, "n c"]) -> Float[Array, "g m c"]:
        """Cuts the tokens of a grid, in row-major order, into `g` windows of `m` tokens."""
        if not self.size:
            return x[None]
        (height, width), (rows, columns) = self.shape, self._counts
        x = x.reshape(*self.grid, -1)  # (h, w, c)
        margins = rows * height - self.grid[0], columns * width - self.grid[1]
        x = jnp.pad(x, ((0, margins[0]), (0, margins[1]), (0, 0)))
        x = jnp.roll(x, (-self.shift[0], -self.shift[1]), axis=(0, 1)) if any(self.shift) else x
        return rearrange(x, "(r i) (s j) c -> (r s) (i j) c", i=height, j=width)

    def merge(self, x: Float[Array, "g m c"]) -> Float[Array, "n c"]:
        """The inverse of `split`: puts the tokens back in their places."""
        if not self.size:
            return x[0]
        (height, width), (rows, columns) = self.shape, self._counts
        x = rearrange(x, "(r s) (i j) c -> (r i) (s j) c", r=rows, s=columns, i=height, j=width)
        x = jnp.roll(x, self.shift, axis=(0, 1)) if any(self.shift) else x
        return x[: self.grid[0], : self.grid[1]].reshape(self.grid[0] * self.grid[1], -1)

    @property
    def mask(self) -> Float[Array, "g 1 m h w"] | None:
        """What is added to the logits of the pairs of tokens of each window, or `None` without a shift.

        It is zero for two tokens whose rows and whose columns both wrapped around, or both did not.
        """
        if not any(self.shift):
            return None
        (height, width), counts = self.shape, self._counts
        # Only the last window of a side is joined from two parts.
        positions = [jnp.arange(count * side, dtype=jnp.int32) for count, side in zip(counts, self.shape, strict=True)]
        rows, columns = (
            position // side + (position >= len(position) - shift).astype(jnp.int32)
            for position, side, shift in zip(positions, self.shape, self.shift, strict=True)
        )
        part = rows[:, None] * (counts[1] + 1) + columns[None, :]  # (h, w) of the padded grid
        part = rearrange(part, "(r i) (s j) -> (r s) (i j)", i=height, j=width)  # (g, m)
        apart = part[:, :, None] != part[:, None, :]  # (g, m, m)
        return jnp.where(apart, MASKED, 0.0).reshape(part.shape[0], 1, -1, height, width)


class Groups(NamedTuple):
    """Groups of consecutive tokens: `groups` of `length` tokens each.

    >>> groups = Groups(groups=2, length=3)
    >>> groups.split(jnp.arange(6.0)[:, None])[..., 0].tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """

    groups: int
    length: int
    mask = None

    @property
    def shape(self) -> tuple[int, int]:
        """A group as a row of tokens."""
        return 1, self.length

    def split(self, x: Float[Array, "n c"]) -> Float[Array, "g m c"]:
        """Separates the groups."""
        return x.reshape(self.groups, self.length, -1)

    def merge(self, x: Float[Array, "g m c"]) -> Float[Array, "n c"]:
        """The inverse of `split`."""
        return x.reshape(self.groups * self.length, -1)


# How the tokens of an image are grouped for attention, which stays within each group.
Grouping = Windows | Groups
