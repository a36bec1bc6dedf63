"""Boxes as offsets from anchors, the regression target of the R-CNN family."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._boxes import _corners, _ratio, _upcast


# Largest log-scale that is decoded: a box grows to at most 1000/16 times its anchor, so that `exp` cannot overflow.
# The figure is Detectron's, and torchvision's.
MAX_LOG_SCALE = math.log(1000.0 / 16)

Weights = tuple[float, float, float, float] | Float[Array, "4"]


def _checked(weights):
    if isinstance(weights, tuple) and not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"weights must be four positive numbers, got {weights}")
    return weights


def _centres_and_sizes(boxes):
    x0, y0, x1, y1 = _corners(boxes)
    width, height = x1 - x0, y1 - y0
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def _log_scale(size, anchor_size):
    ratio = _ratio(size, anchor_size)
    return jnp.where(ratio > 0, jnp.log(jnp.where(ratio > 0, ratio, 1)), 0)


def encode_boxes(
    boxes: Float[Array, "n 4"], anchors: Float[Array, "n 4"], *, weights: Weights = (1.0, 1.0, 1.0, 1.0)
) -> Float[Array, "n 4"]:
    """Offsets `(dx, dy, dw, dh)` that take each anchor to its box.

    `dx, dy` move the centre in units of the anchor's size, `dw, dh` are log-scales; each is multiplied by its weight.
    Where an anchor has no width, `dx` and `dw` are 0; where a box has none, `dw` is; the same for heights. The gradient
    there is 0, so that padded rows stay finite. Result in the dtype of `boxes`.

    Raises ValueError for weights that are not positive. Ren et al. 2015, https://arxiv.org/abs/1506.01497, equation 2.

    >>> boxes, anchors = jnp.array([[2.0, 0.0, 6.0, 4.0]]), jnp.array([[0.0, 0.0, 4.0, 4.0]])
    >>> encode_boxes(boxes, anchors, weights=(10, 10, 5, 5)).tolist()
    [[5.0, 0.0, 0.0, 0.0]]
    """
    wx, wy, ww, wh = _checked(weights)
    cx, cy, width, height = _centres_and_sizes(boxes)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centres_and_sizes(anchors)
    deltas = [
        _ratio(wx * (cx - anchor_cx), anchor_width),  # dx = wx (cx - acx) / aw
        _ratio(wy * (cy - anchor_cy), anchor_height),
        ww * _log_scale(width, anchor_width),  # dw = ww log(w / aw)
        wh * _log_scale(height, anchor_height),
    ]
    return jnp.stack(deltas, axis=1).astype(boxes.dtype)


def decode_boxes(
    deltas: Float[Array, "n 4"], anchors: Float[Array, "n 4"], *, weights: Weights = (1.0, 1.0, 1.0, 1.0)
) -> Float[Array, "n 4"]:
    """Boxes that the offsets `(dx, dy, dw, dh)` make of the anchors: the inverse of `encode_boxes`.

    Log-scales are clamped from above at `log(1000 / 16)`, with a zero gradient beyond. The boxes are in the anchors'
    pixels and have their dtype, so that deltas in bfloat16 give float32 boxes from float32 anchors. They are not
    clipped to the image. An anchor without extent gives a box without extent.

    Raises ValueError for weights that are not positive.

    >>> decode_boxes(jnp.array([[0.5, 0.0, 0.0, 0.0]]), jnp.array([[0.0, 0.0, 4.0, 4.0]])).tolist()
    [[2.0, 0.0, 6.0, 4.0]]
    """
    wx, wy, ww, wh = _checked(weights)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centres_and_sizes(anchors)
    dx, dy, dw, dh = _upcast(deltas).T  # each (n,)
    cx = dx / wx * anchor_width + anchor_cx
    cy = dy / wy * anchor_height + anchor_cy
    half_width = 0.5 * (jnp.exp(jnp.minimum(dw / ww, MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (jnp.exp(jnp.minimum(dh / wh, MAX_LOG_SCALE)) * anchor_height)
    corners = [cx - half_width, cy - half_height, cx + half_width, cy + half_height]
    return jnp.stack(corners, axis=1).astype(anchors.dtype)
