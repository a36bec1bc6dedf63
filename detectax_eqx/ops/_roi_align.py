"""RoIAlign: features of fixed size for boxes of any size, by bilinear sampling. He et al. 2017, section 3."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .._xla import lay_out, pool
from ._boxes import _upcast
from ._sampling import box_axis, check_sampling_ratio, output_bins
from ._substitute import replaceable
from ._taps import BilinearTaps


# Added to a level before rounding down, so that a box of exactly the canonical size does not fall short of its level.
LEVEL_EPSILON = 1e-6


def roi_align(
    features: Float[Array, "c h w"],
    boxes: Float[Array, "n 4"],
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Float[Array, "n c p q"]:
    """Features of each box, averaged over a grid of `output_size` = `(p, q)` bins (or a number, for both).

    - `boxes`: `(x0, y0, x1, y1)` in pixels; `spatial_scale` times a pixel coordinate is a coordinate of the map.
    - `sampling_ratio`: every bin is the mean of `sampling_ratio**2` bilinear samples, evenly spaced within it. 0 is the
      adaptive choice of `ceil(box side / output side)` a bin along each axis, measured on the map.
    - `aligned`: the value of cell `i`, which covers `[i, i + 1)`, belongs to its middle, the coordinate `i + 0.5`. So
      half a cell has to be taken off a coordinate to make it an index. With `aligned=False` this is left out: boxes
      read half a cell too far down and right, and one cell is the least side of a box. torchvision's detectors were
      trained so; Detectron2's are aligned.

    A sample outside the map by more than a cell reads 0, one less far out reads the border: torchvision's rule,
    exactly. A box without extent reads a point, or, with adaptive sampling of an aligned one, has no samples and
    gives 0. So do boxes that are not finite. Padded boxes cost what others do, and nothing else. Sums are in float32;
    the result has the dtype of the features. Differentiable in reverse mode, in the features and in the boxes. Along
    an axis, a box that is clamped at the border or to one cell has a gradient of 0.

    Raises a ValueError for an `output_size` below 1, a `spatial_scale` that is not positive, a map without cells, and a
    negative `sampling_ratio`.

    >>> features = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> boxes = jnp.array([[0.0, 0.0, 1.0, 1.0]])
    >>> roi_align(features, boxes, output_size=2, spatial_scale=1)[0, 0].tolist()
    [[1.0, 1.25], [1.5, 1.75]]
    """
    if not (spatial_scale > 0 and math.isfinite(spatial_scale)):
        raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}.")
    level = jnp.zeros(boxes.shape[0], jnp.int32)
    return _align(_end_to_end([features]), boxes, [spatial_scale], level, output_size, sampling_ratio, aligned)


def multilevel_roi_align(
    features: Sequence[Float[Array, "c _ _"]],
    boxes: Float[Array, "n 4"],
    *,
    output_size: int | tuple[int, int],
    strides: Sequence[int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Float[Array, "n c p q"]:
    """`roi_align` on the level of a feature pyramid that suits each box's size, finest level first in `features`.

    A box of area `s**2` reads level `floor(canonical_level + log2(s / canonical_size) + 1e-6)`, where a level `k` is
    the map of stride `2**k`, and the nearest level there is if that one is not among `strides`. Lin et al. 2017,
    equation 1. A box without area reads the finest. It reads its own level only, and once; the choice has no
    gradient.

    `boxes` are in pixels. `output_size`, `sampling_ratio` and `aligned` are those of `roi_align`, with `1 / stride`
    as scale.

    Raises a ValueError unless there is a stride for each level, each a power of two and twice the one before, and in
    the cases of `roi_align`.

    >>> fine, coarse = jnp.zeros((1, 8, 8)), jnp.ones((1, 4, 4))
    >>> boxes = jnp.array([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 32.0, 32.0]])
    >>> pooled = multilevel_roi_align([fine, coarse], boxes, output_size=1, strides=(4, 8), canonical_size=64)
    >>> pooled.ravel().tolist()
    [0.0, 1.0]
    """
    pool = level_pooler(
        features,
        strides=strides,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    return pool(boxes, output_size=output_size)


@replaceable
def level_pooler(
    features: Sequence[Float[Array, "c _ _"]],
    *,
    strides: Sequence[int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Callable[..., Float[Array, "n c p q"]]:
    """`multilevel_roi_align` of these features, as a function of `boxes` and `output_size`.

    The maps are laid out here, once for all calls.
    """
    strides = tuple(strides)
    if not strides or len(strides) != len(features):
        raise ValueError(f"strides must have one entry for each of the {len(features)} feature maps, got {strides}.")
    first = strides[0].bit_length() - 1
    if strides[0] < 1 or strides != tuple(2 ** (first + i) for i in range(len(strides))):
        raise ValueError(f"strides must be powers of two, each twice the one before, got {strides}.")
    # The type checker looks at one map of the sequence only.
    if len({(feature.ndim, feature.shape[0], feature.dtype) for feature in features}) > 1:
        maps = ", ".join(f"{feature.dtype}{list(feature.shape)}" for feature in features)
        raise ValueError(f"features must have the same axes, channels and dtype on all levels, got {maps}.")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be positive, got {canonical_size}.")
    maps = _end_to_end(features)

    def of_boxes(boxes: Float[Array, "n 4"], *, output_size: int | tuple[int, int]) -> Float[Array, "n c p q"]:
        level = _levels(boxes, first, first + len(strides) - 1, canonical_size, canonical_level) - first
        return _align(maps, boxes, [1 / stride for stride in strides], level, output_size, sampling_ratio, aligned)

    return of_boxes


def _levels(
    boxes: Float[Array, "n 4"], first: int, last: int, canonical_size: float, canonical_level: int
) -> Int32[Array, " n"]:
    """The level of each box, among `first..last`."""
    boxes = _upcast(boxes)
    size = jnp.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    known = size > 0  # neither a box of no area, nor one of negative area
    level = jnp.floor(canonical_level + jnp.log2(jnp.where(known, size, 1) / canonical_size) + LEVEL_EPSILON)
    return jnp.where(known, jnp.clip(level, first, last), first).astype(jnp.int32)


class _Maps(NamedTuple):
    """Maps as `pool` reads them: their cells end to end, and where each begins. Sums are in the dtype of the cells."""

    cells: Float[Array, "l c"]
    sides: tuple[tuple[int, int, int], ...]  # (height, width, first cell) of each
    dtype: jnp.dtype


def _end_to_end(features):
    for feature in features:
        if 0 in feature.shape[1:]:
            raise ValueError(f"features must have at least one row and column, got a map of shape {feature.shape}.")
    counts = [math.prod(feature.shape[1:]) for feature in features]
    sides = tuple((*feature.shape[1:], sum(counts[:i])) for i, feature in enumerate(features))
    # Sums, and the gradients of cells that many boxes read.
    return _Maps(_upcast(lay_out(sides, tuple(features))), sides, features[0].dtype)


def _align(maps, boxes, scales, level, output_size, sampling_ratio, aligned):
    """RoIAlign on several maps, each box on the one that `level` names, at that map's scale."""
    rows, columns = output_bins(output_size)
    check_sampling_ratio(sampling_ratio)
    if boxes.shape[0] == 0:
        return jnp.zeros((0, maps.cells.shape[1], rows, columns), maps.dtype)

    boxes = _upcast(boxes)
    scale = jnp.asarray(scales, boxes.dtype)[level]
    y, height = box_axis(boxes[:, 1], boxes[:, 3], scale, bins=rows, aligned=aligned)
    x, width = box_axis(boxes[:, 0], boxes[:, 2], scale, bins=columns, aligned=aligned)
    grids = jnp.stack([y, height, x, width], axis=1).astype(maps.cells.dtype)
    taps = BilinearTaps((rows, columns), sampling_ratio)
    pooled = pool(taps, maps.cells, grids, jnp.asarray(maps.sides, jnp.int32)[level])  # (n, p, q, c)
    return pooled.transpose(0, 3, 1, 2).astype(maps.dtype)
