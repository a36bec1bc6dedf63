"""Anchors: boxes on a regular grid that a dense head refines."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32


def _base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], rounded: bool) -> Float32[np.ndarray, "a 4"]:
    """Anchors centred on the origin, rounded half to even if `rounded`."""
    if not rounded:  # in double precision, as in Detectron2
        area, ratio = np.square(np.asarray(sizes, np.float64))[None, :], np.asarray(aspect_ratios, np.float64)[:, None]
        width = np.sqrt(area / ratio)  # (ratios, sizes)
        height = ratio * width
        width, height = width.reshape(-1), height.reshape(-1)
        return (np.stack([-width, -height, width, height], axis=1) / 2).astype(np.float32)
    # In single precision, as in torchvision: the rounding depends on the last bit.
    scale_y = np.sqrt(np.asarray(aspect_ratios, np.float32))[:, None]  # (ratios, 1)
    scale_x = 1 / scale_y
    size = np.asarray(sizes, np.float32)[None, :]  # (1, sizes)
    width, height = (scale_x * size).reshape(-1), (scale_y * size).reshape(-1)  # (a,); w h = size², h / w = ratio
    return np.round(np.stack([-width, -height, width, height], axis=1) / 2)


def anchor_grid(
    feature_size: tuple[int, int],
    *,
    stride: int | tuple[int, int],
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    rounded: bool = True,
) -> Float32[Array, "n 4"]:
    """Generates the anchors of a feature map of `(h, w)` cells, in pixels.

    There are `n = h * w * len(aspect_ratios) * len(sizes)` anchors, ordered by row, column, aspect ratio and size, with
    the size varying fastest. An aspect ratio is height / width. The area of an anchor is `size**2` before rounding to
    whole pixels. Anchors are centred on the top-left corner `(x * stride, y * stride)` of their cell, without a
    half-stride offset, exactly as in torchvision's `AnchorGenerator`. `stride` is a number of pixels or
    `(stride_y, stride_x)`. A map without cells has no anchors.

    - `rounded`: whether the sides of anchors are rounded to whole pixels, as in torchvision. Detectron2 does not.

    Raises a `ValueError` for a negative feature size, and for strides, sizes or aspect ratios that are not positive.

    >>> anchor_grid((1, 2), stride=8, sizes=(32,), aspect_ratios=(1.0,)).tolist()
    [[-16.0, -16.0, 16.0, 16.0], [-8.0, -16.0, 24.0, 16.0]]
    """
    stride_y, stride_x = (stride, stride) if isinstance(stride, int) else stride
    if min(feature_size) < 0:
        raise ValueError(f"feature_size must not be negative, got {feature_size}")
    if min(stride_y, stride_x) <= 0:
        raise ValueError(f"stride must be positive, got {stride}")
    for name, values in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"{name} must be one or more positive numbers, got {values}")
    height, width = feature_size
    y = jnp.broadcast_to((jnp.arange(height) * stride_y)[:, None], feature_size)  # (h, w)
    x = jnp.broadcast_to((jnp.arange(width) * stride_x)[None, :], feature_size)
    corners = jnp.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4).astype(jnp.float32)  # (h w, 1, 4)
    # (h w, 1, 4) + (1, a, 4) -> (h w a, 4)
    return (corners + jnp.asarray(_base_anchors(sizes, aspect_ratios, rounded))[None]).reshape(-1, 4)
