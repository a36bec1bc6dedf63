"""Keypoints and heatmaps: the most likely position of each point, and the target bin of each annotated one.

A heatmap has one value per bin of a grid that fills a box, and one map per point.
"""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int32

from .._xla import varying_like
from ._bicubic import REACH, cubic_weights
from ._boxes import upcast


# The resized maps are searched in square tiles of this side, so that the size of the program's arrays does not depend
# on the box.
TILE = 64
# Boxes with longer sides are searched on a grid of this many positions per side. They are far larger than any image.
LARGEST_GRID = 2**14


def keypoints_from_heatmaps(
    heatmaps: Float[Array, "k s s"], box: Float[Array, " 4"], *, probabilities: bool = False
) -> Float[Array, "k 3"]:
    """Returns the position and score of each point: `(x, y, score)`, at the maximum of its heatmap.

    - `heatmaps`: one map per point, in the frame of the box.
    - `box`: `(x0, y0, x1, y1)` in pixels of the image. Positions are in the same pixels.
    - `probabilities`: whether the score of logits is a probability, as in Detectron2: their softmax over the bins of
      the heatmap, at the interpolated maximum. It may exceed 1 a little.

    Equals torchvision's `heatmaps_to_keypoints`. Each map is resized to `ceil(height) × ceil(width)` pixels by bicubic
    interpolation, with pixel values at pixel centres, and its maximum is taken; on ties, the first in row-major order.
    Column `i` of `ceil(width)` is at `x0 + (i + 0.5) * width / ceil(width)`. The score is the interpolated value, so
    the score of logits is a logit. A side below one pixel counts as one pixel. If the box is not finite, the result is
    NaN.

    The number of positions depends on the box, but the program does not: a loop visits tiles of the resized map. Under
    `vmap`, it runs until the largest box is done, so padded rows should not be large.

    Differentiable in the box and, for the score, in the heatmaps. The choice of the maximum has no gradient.

    >>> heatmaps = jnp.zeros((1, 4, 4)).at[0, 1, 2].set(1.0)
    >>> keypoints_from_heatmaps(heatmaps, jnp.array([10.0, 20.0, 14.0, 24.0])).tolist()
    [[12.5, 21.5, 1.0]]
    """
    values = upcast(heatmaps)
    box = box.astype(values.dtype)
    num_points, size = values.shape[:2]
    finite = jnp.isfinite(box).all()
    box = jnp.where(finite, box, 0)
    sides = jnp.maximum(box[2:] - box[:2], 1)  # (2,): width, height
    counts = jnp.clip(jnp.ceil(lax.stop_gradient(sides)), 1, LARGEST_GRID).astype(jnp.int32)
    # Beyond the border, interpolation reads the outermost bins.
    values = jnp.pad(values, [(0, 0), (REACH, REACH), (REACH, REACH)], mode="edge")  # (k, s + 4, s + 4)
    index = _argmax(lax.stop_gradient(values), counts, size)
    column, row = index % counts[0], index // counts[0]  # (k,)
    weights = cubic_weights(row, counts[1], size, values.dtype), cubic_weights(column, counts[0], size, values.dtype)
    scores = jnp.einsum("ki,kij,kj->k", weights[0], values, weights[1], precision="highest")
    if probabilities:
        scores = jnp.exp(scores - logsumexp(upcast(heatmaps), axis=(1, 2)))
    cells = jnp.stack([column, row], axis=1).astype(values.dtype) + 0.5  # (k, 2)
    places = cells * (sides / counts.astype(values.dtype))[None] + box[None, :2]
    points = jnp.concatenate([places, scores[:, None]], axis=1)  # (k, 3)
    return jnp.where(finite, points, jnp.nan).astype(heatmaps.dtype).reshape(num_points, 3)


def _argmax(values: Float[Array, "k p p"], counts: Int32[Array, " 2"], size: int) -> Int32[Array, " k"]:
    """Row-major index of the maximum of each padded map when resized to `counts` = `(width, height)`."""
    tiles = -(-counts // TILE)  # (2,)
    offsets = jnp.arange(TILE, dtype=jnp.int32)

    def search(state):
        tile, best, index = state
        rows, columns = tile // tiles[0] * TILE + offsets, tile % tiles[0] * TILE + offsets  # (t,) each
        vertical = cubic_weights(rows, counts[1], size, values.dtype)  # (t, p)
        horizontal = cubic_weights(columns, counts[0], size, values.dtype)  # (t, p)
        resized = jnp.einsum("ri,kij->krj", vertical, values, precision="highest")  # (k, t, p)
        resized = jnp.einsum("krj,cj->krc", resized, horizontal, precision="highest")  # (k, t, t)
        inside = (rows < counts[1])[:, None] & (columns < counts[0])[None, :]
        resized = jnp.where(inside[None], resized, -jnp.inf).reshape(values.shape[0], TILE**2)
        place = jnp.argmax(resized, axis=1).astype(jnp.int32)  # (k,)
        value = jnp.max(resized, axis=1)
        there = rows[place // TILE] * counts[0] + columns[place % TILE]
        better = (value > best) | ((value == best) & (there < index))
        return tile + 1, jnp.where(better, value, best), jnp.where(better, there, index)

    start = jnp.int32(0), jnp.full(values.shape[0], -jnp.inf, values.dtype), jnp.zeros(values.shape[0], jnp.int32)
    start = varying_like(start, values, counts)
    return lax.while_loop(lambda state: state[0] < tiles[0] * tiles[1], search, start)[2]


def keypoint_targets(
    keypoints: Float[Array, "n k 3"], boxes: Float[Array, "n 4"], *, size: int
) -> tuple[Int32[Array, "n k"], Bool[Array, "n k"]]:
    """Returns the bin of each point in a `size × size` heatmap of its box, and whether the point counts.

    - `keypoints`: `(x, y, visibility)`, in the same pixels as `boxes`. Row `i` belongs to box `i`.
    - `size`: side of the heatmaps, in bins.

    Equals torchvision's `keypoints_to_heatmap`. The bin is the row-major index `row * size + column`, with
    `column = floor((x - x0) * size / (x1 - x0))`. A point on the right or bottom border of the box belongs to the last
    bin. A point does not count if it lies outside the box or its visibility is 0; its bin is then 0. Neither does any
    point of a box without an area.

    Raises a `ValueError` for a `size` below 1.

    >>> keypoints = jnp.array([[[12.0, 5.0, 2.0], [14.0, 9.0, 1.0], [12.0, 5.0, 0.0], [15.0, 5.0, 2.0]]])
    >>> bins, counts = keypoint_targets(keypoints, jnp.array([[10.0, 5.0, 14.0, 9.0]]), size=4)
    >>> bins.tolist(), counts.tolist()
    ([[2, 15, 0, 0]], [[True, True, False, False]])
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    points, boxes = upcast(keypoints), upcast(boxes)
    dtype = max(points.dtype, boxes.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    points, boxes = points.astype(dtype), boxes.astype(dtype)
    start, end = boxes[:, None, :2], boxes[:, None, 2:]  # (n, 1, 2)
    extent = end - start
    has_extent = (extent > 0) & jnp.isfinite(extent)
    places = jnp.floor((points[..., :2] - start) * (size / jnp.where(has_extent, extent, 1)))  # (n, k, 2)
    places = jnp.where(points[..., :2] == end, size - 1, places)
    counted = ((places >= 0) & (places < size) & has_extent).all(axis=2) & (points[..., 2] > 0)  # false for NaN
    column, row = jnp.unstack(jnp.where(counted[..., None], places, 0).astype(jnp.int32), axis=2)  # (n, k) each
    return row * size + column, counted
