"""Bilinear sampling of maps at points, and the attention that samples them (Deformable DETR, arXiv:2010.04159)."""

from collections.abc import Sequence

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from .._xla import by_example
from ._boxes import upcast


def grid_sample(x: Float[Array, "c h w"], points: Float[Array, "*n 2"]) -> Float[Array, "*n c"]:
    """Samples a map at points `(x, y)` in -1..1, from the left and upper edge of the map to the right and lower edge.

    Interpolates between the centres of pixels. Outside the map is 0. Differentiable in both arguments.

    The values are those of torch's `grid_sample` with its defaults (bilinear, zero padding, `align_corners=False`),
    whose result has its channels first.

    >>> grid_sample(jnp.array([[[0.0, 4.0]]]), jnp.array([[-0.5, 0.0], [0.0, 0.0], [1.0, 0.0]])).tolist()
    [[0.0], [2.0], [2.0]]
    """
    return point_sample(x, (points + 1) / 2)


def point_sample(x: Float[Array, "c h w"], points: Float[Array, "*n 2"]) -> Float[Array, "*n c"]:
    """As `grid_sample`, at points `(x, y)` in 0..1.

    The function of the same name of Detectron2 (PointRend, arXiv:1912.08193), with which the losses of mask
    transformers sample their masks.

    >>> point_sample(jnp.array([[[0.0, 4.0]]]), jnp.array([[0.25, 0.5], [0.5, 0.5], [1.0, 0.5]])).tolist()
    [[0.0], [2.0], [2.0]]
    """
    rows = rearrange(x, "c h w -> (h w) c")
    return _sample(rows, (x.shape[1], x.shape[2]), points)


def deformable_attention(
    value: Sequence[Float[Array, "a d _ _"]],
    locations: Float[Array, "q a l p 2"],
    weights: Float[Array, "q a l p"],
) -> Float[Array, "q a d"]:
    """Sums the values that each of `q` queries and `a` heads samples at `p` points of each of `l` maps.

    - `value`: the maps of the levels, with `d` channels for each head.
    - `locations`: the points `(x, y)` in 0..1, from the left and upper edge of each map to the right and lower edge.
      Values are interpolated between the centres of pixels; outside the map is 0.
    - `weights`: of the points; in Deformable DETR (arXiv:2010.04159, equation 3) a softmax over levels and points.

    Raises a `ValueError` unless there is a map for each level.

    >>> value = [jnp.array([[[[0.0, 4.0]]]])]
    >>> locations = jnp.array([[0.25, 0.5], [0.5, 0.5]]).reshape(1, 1, 1, 2, 2)
    >>> deformable_attention(value, locations, jnp.full((1, 1, 1, 2), 0.5)).item()
    1.0
    """
    levels = locations.shape[2]
    if len(value) != levels:
        raise ValueError(f"value must have a map for each of the {levels} levels of locations, got {len(value)}.")
    count = 4 * weights.size * value[0].shape[1]  # four pixels for each point
    return by_example(locations, weights, *value, cpu=_sampled_sum, default=_sampled_sum, values=count)


def _sampled_sum(locations, weights, *value):
    total = jnp.zeros((), value[0].dtype)
    for level, x in enumerate(value):
        heads = x.shape[0]
        rows = rearrange(x, "a d h w -> (a h w) d")
        points = rearrange(locations[:, :, level], "q a p xy -> a (q p) xy")
        first = jnp.arange(heads, dtype=jnp.int32) * (x.shape[2] * x.shape[3])
        sampled = _sample(rows, (x.shape[2], x.shape[3]), points, first[:, None])  # (a, q p, d)
        sampled = rearrange(sampled, "a (q p) d -> q a p d", p=weights.shape[3])
        total = total + jnp.einsum("qapd,qap->qad", sampled, weights[:, :, level].astype(sampled.dtype))
    return total


def _sample(
    rows: Float[Array, "m d"], size: tuple[int, int], points: Float[Array, "*n 2"], first: Array | int = 0
) -> Float[Array, "*n d"]:
    """Samples a map of `size`, whose pixels are the rows from `first` on, at points in 0..1."""
    height, width = size
    column, row = (upcast(points[..., i]) * side - 0.5 for i, side in enumerate((width, height)))
    left, top = jnp.floor(column), jnp.floor(row)
    total = jnp.zeros((), rows.dtype)
    for x, across in ((left, left + 1 - column), (left + 1, column - left)):
        for y, down in ((top, top + 1 - row), (top + 1, row - top)):
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = jnp.where(inside, y * width + x, 0).astype(jnp.int32) + first
            weight = jnp.where(inside, across * down, 0).astype(rows.dtype)
            total = total + weight[..., None] * rows[index]
    return total
