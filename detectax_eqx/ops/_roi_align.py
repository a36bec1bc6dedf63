"""RoIAlign: features of fixed size for boxes of any size by bilinear sampling. He et al. 2017, section 3."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .._xla import lay_out, named_call, pool, varying_like
from ._boxes import upcast
from ._sampling import box_axis, check_sampling_ratio, output_bins
from ._taps import BilinearTaps


# Added to a level before rounding down, so that a box of exactly the canonical size is not assigned to the level below:
# torchvision's value.
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
    """Pools the features of each box into a grid of `output_size` = `(p, q)` bins, or one number for both.

    - `boxes`: `(x0, y0, x1, y1)` in pixels. Multiplying by `spatial_scale` gives coordinates of the feature map.
    - `sampling_ratio`: each bin is the mean of `sampling_ratio**2` bilinear samples, evenly spaced within the bin. With
      0, the number is adaptive: `ceil(box side / output side)` per bin along each axis, measured on the feature map.
    - `aligned`: whether to subtract half a cell from coordinates. Cell `i` covers `[i, i + 1)` and its value belongs to
      its centre: a coordinate of 1.3 has neighbours 0.5 and 1.5, which are the cells with indices 0 and 1. Subtracting
      0.5 turns a coordinate into an index. With `aligned=False` nothing is subtracted: boxes are sampled half a cell
      too far down and right, and their sides are at least one cell. torchvision's detectors were trained with
      `aligned=False`, Detectron2's with `aligned=True`.

    A sample more than one cell outside the map is 0; a sample closer than that reads the border, exactly as in
    torchvision. A box without extent samples a single point, or, with adaptive sampling and `aligned=True`, has no
    samples and gives 0. Boxes that are not finite give 0. Padded boxes cost as much as valid ones and have no other
    effect. Sums are in float32, and the result has the dtype of the features. Supports reverse-mode differentiation in
    the features and in the boxes. Along an axis, the gradient is 0 for a box that is clamped at the border or to one
    cell.

    Raises a `ValueError` for an `output_size` below 1, a `spatial_scale` that is not positive, a map without cells, or
    a negative `sampling_ratio`.

    >>> features = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> boxes = jnp.array([[0.0, 0.0, 1.0, 1.0]])
    >>> roi_align(features, boxes, output_size=2, spatial_scale=1)[0, 0].tolist()
    [[1.0, 1.25], [1.5, 1.75]]
    """
    if not (spatial_scale > 0 and math.isfinite(spatial_scale)):
        raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}.")
    level = jnp.zeros(boxes.shape[0], jnp.int32)
    maps = (features,)
    return _align(maps, _cells(maps), boxes, level, [spatial_scale], output_size, sampling_ratio, aligned)


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
    level_epsilon: float = LEVEL_EPSILON,
    size_epsilon: float = 0.0,
) -> Float[Array, "n c p q"]:
    """Applies `roi_align` to a feature pyramid, assigning each box to a level by its size.

    `features` are the levels, finest first. A box of area `s**2` is pooled from level
    `floor(canonical_level + log2(s / canonical_size + size_epsilon) + level_epsilon)`, clamped to the levels available,
    where level `k` is the map of stride `2**k`. Lin et al. 2017, equation 1. A box without area is assigned to the
    finest level. Each box reads its own level only, and the assignment has no gradient.

    - `level_epsilon`, `size_epsilon`: decide for boxes whose size lies exactly between two levels. The defaults are
      torchvision's; Detectron2 has 0 and 1e-8.

    `boxes` are in pixels. `output_size`, `sampling_ratio` and `aligned` are those of `roi_align`; the spatial scale is
    `1 / stride`.

    Raises a `ValueError` unless there is one stride per level, each a power of two and twice the previous one, and in
    the same cases as `roi_align`.

    >>> fine, coarse = jnp.zeros((1, 8, 8)), jnp.ones((1, 4, 4))
    >>> boxes = jnp.array([[0.0, 0.0, 16.0, 16.0], [0.0, 0.0, 32.0, 32.0]])
    >>> pooled = multilevel_roi_align([fine, coarse], boxes, output_size=1, strides=(4, 8), canonical_size=64)
    >>> pooled.ravel().tolist()
    [0.0, 1.0]
    """
    rois = RoIFeatures(
        features,
        strides=strides,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
        level_epsilon=level_epsilon,
        size_epsilon=size_epsilon,
    )
    return rois.pool(boxes, output_size=output_size)


class RoIFeatures(eqx.Module):
    """A feature pyramid for pooling boxes: `multilevel_roi_align` with the maps laid out once for all calls.

    - `features`, stored as `maps`: the levels, finest first, each `(c, h, w)`.
    - `strides`, `sampling_ratio`, `aligned`, `canonical_size`, `canonical_level`, `level_epsilon`, `size_epsilon`: see
      `multilevel_roi_align`.

    >>> fine, coarse = jnp.zeros((1, 8, 8)), jnp.ones((1, 4, 4))
    >>> features = RoIFeatures([fine, coarse], strides=(4, 8), canonical_size=64)
    >>> features.pool(jnp.array([[0.0, 0.0, 32.0, 32.0]]), output_size=1).ravel().tolist()
    [1.0]
    """

    maps: tuple[Float[Array, "c _ _"], ...]
    cells: Float[Array, "l c"]
    strides: tuple[int, ...] = eqx.field(static=True)
    sampling_ratio: int = eqx.field(static=True)
    aligned: bool = eqx.field(static=True)
    canonical_size: float = eqx.field(static=True)
    canonical_level: int = eqx.field(static=True)
    level_epsilon: float = eqx.field(static=True)
    size_epsilon: float = eqx.field(static=True)

    def __init__(
        self,
        features: Sequence[Float[Array, "c _ _"]],
        *,
        strides: Sequence[int],
        sampling_ratio: int = 2,
        aligned: bool = True,
        canonical_size: float = 224,
        canonical_level: int = 4,
        level_epsilon: float = LEVEL_EPSILON,
        size_epsilon: float = 0.0,
    ):
        strides = tuple(strides)
        if not strides or len(strides) != len(features):
            raise ValueError(
                f"strides must have one entry for each of the {len(features)} feature maps, got {strides}."
            )
        first = strides[0].bit_length() - 1
        if strides[0] < 1 or strides != tuple(2 ** (first + i) for i in range(len(strides))):
            raise ValueError(f"strides must be powers of two, each twice the previous one, got {strides}.")
        # The runtime type checker only checks one map of the sequence.
        if len({(x.ndim, x.shape[0], x.dtype) for x in features}) > 1:
            shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in features)
            raise ValueError(f"features must have the same axes, channels and dtype on all levels, got {shapes}.")
        if not canonical_size > 0:
            raise ValueError(f"canonical_size must be positive, got {canonical_size}.")
        self.maps = tuple(features)
        self.cells = _cells(self.maps)
        self.strides = strides
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.canonical_size = canonical_size
        self.canonical_level = canonical_level
        self.level_epsilon = level_epsilon
        self.size_epsilon = size_epsilon

    def pool(self, boxes: Float[Array, "n 4"], *, output_size: int | tuple[int, int]) -> Float[Array, "n c p q"]:
        """Pools the features of `boxes`, in canvas pixels, each from the level for its size."""
        first = self.strides[0].bit_length() - 1
        last = first + len(self.strides) - 1
        options = (self.canonical_size, self.canonical_level, self.level_epsilon, self.size_epsilon)
        level = _levels(boxes, first, last, *options) - first  # (n,)
        scales = [1 / stride for stride in self.strides]
        return _align(self.maps, self.cells, boxes, level, scales, output_size, self.sampling_ratio, self.aligned)


def _levels(
    boxes: Float[Array, "n 4"],
    first: int,
    last: int,
    canonical_size: float,
    canonical_level: int,
    level_epsilon: float = LEVEL_EPSILON,
    size_epsilon: float = 0.0,
) -> Int32[Array, " n"]:
    """Assigns each box to a level in `first..last`."""
    boxes = upcast(boxes)
    size = jnp.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))  # √area, (n,)
    known = size > 0  # false for zero and negative areas
    ratio = jnp.where(known, size, 1) / canonical_size + size_epsilon
    level = jnp.floor(canonical_level + jnp.log2(ratio) + level_epsilon)
    return jnp.where(known, jnp.clip(level, first, last), first).astype(jnp.int32)


def _cells(maps: tuple[Float[Array, "c _ _"], ...]) -> Float[Array, "l c"]:
    """Concatenates the cells of all maps, channels last, in the dtype of the sums."""
    for x in maps:
        if 0 in x.shape[1:]:
            raise ValueError(f"features must have at least one row and column, got a map of shape {x.shape}.")
    return upcast(lay_out(_sides(maps), varying_like(maps)))


def _sides(maps) -> tuple[tuple[int, int, int], ...]:
    """`(height, width, first cell)` of each map."""
    counts = [math.prod(x.shape[1:]) for x in maps]
    return tuple((*x.shape[1:], sum(counts[:i])) for i, x in enumerate(maps))


def _align(maps, cells, boxes, level, scales, output_size, sampling_ratio, aligned):
    """RoIAlign on several maps. Box `i` reads map `level[i]` at that map's scale. `cells` are the cells of `maps`."""
    check_sampling_ratio(sampling_ratio)
    options = {"scales": tuple(map(float, scales)), "output_size": output_bins(output_size)}
    return named_call(_roi_align, maps, cells, boxes, level, **options, sampling_ratio=sampling_ratio, aligned=aligned)


def _roi_align(maps, cells, boxes, level, *, scales, output_size, sampling_ratio, aligned):
    rows, columns = output_size
    dtype = maps[0].dtype
    if boxes.shape[0] == 0:
        return jnp.zeros((0, cells.shape[1], rows, columns), dtype)

    boxes = upcast(boxes)
    scale = jnp.asarray(scales, boxes.dtype)[level]  # (n,)
    y, height = box_axis(boxes[:, 1], boxes[:, 3], scale, bins=rows, aligned=aligned)
    x, width = box_axis(boxes[:, 0], boxes[:, 2], scale, bins=columns, aligned=aligned)
    grids = jnp.stack([y, height, x, width], axis=1).astype(cells.dtype)  # (n, 4)
    # All vary over the same mesh axes, so that gradients are summed over devices where necessary.
    cells, grids = varying_like((cells, grids), level)
    taps = BilinearTaps((rows, columns), sampling_ratio)
    pooled = pool(taps, cells, grids, jnp.asarray(_sides(maps), jnp.int32)[level])
    return pooled.transpose(0, 3, 1, 2).astype(dtype)  # (n, p, q, c) -> (n, c, p, q)
