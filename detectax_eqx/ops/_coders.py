"""Encoding of boxes as offsets from anchors, the regression targets of the R-CNN family."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._boxes import _corners, _ratio, upcast


# Upper bound for decoded log-scales: a box is at most 1000/16 times as large as its anchor, so that `exp` cannot
# overflow. The value is that of Detectron and torchvision.
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
    """Encodes boxes as offsets `(dx, dy, dw, dh)` from their anchors.

    `dx, dy` are shifts of the centre in units of the anchor's size, and `dw, dh` are log-scales. Each is multiplied by
    its weight. For an anchor without width, `dx` and `dw` are 0; for a box without width, `dw` is 0; likewise for
    heights. The gradient is 0 there, so that padded rows stay finite. The result has the dtype of `boxes`.

    Raises a `ValueError` for weights that are not positive. Ren et al. 2015, https://arxiv.org/abs/1506.01497,
    equation 2.

    >>> boxes, anchors = jnp.array([[2.0, 0.0, 6.0, 4.0]]), jnp.array([[0.0, 0.0, 4.0, 4.0]])
    >>> encode_boxes(boxes, anchors, weights=(10, 10, 5, 5)).tolist()
    [[5.0, 0.0, 0.0, 0.0]]
    """
    wx, wy, ww, wh = _checked(weights)
    cx, cy, width, height = _centres_and_sizes(boxes)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centres_and_sizes(anchors)
    deltas = [
        _ratio(wx * (cx - anchor_cx), anchor_width),  # dx = wx (cx - acx) / aw
        _ratio(wy * (cy - anchor_cy), anchor_height),  # dy = wy (cy - acy) / ah
        ww * _log_scale(width, anchor_width),  # dw = ww log(w / aw)
        wh * _log_scale(height, anchor_height),  # dh = wh log(h / ah)
    ]
    return jnp.stack(deltas, axis=1).astype(boxes.dtype)  # (n, 4)


def decode_boxes(
    deltas: Float[Array, "n 4"], anchors: Float[Array, "n 4"], *, weights: Weights = (1.0, 1.0, 1.0, 1.0)
) -> Float[Array, "n 4"]:
    """Decodes offsets `(dx, dy, dw, dh)` from anchors to boxes: the inverse of `encode_boxes`.

    Log-scales are clamped to at most `log(1000 / 16)`, with a zero gradient beyond. The boxes have the coordinate frame
    and the dtype of the anchors: bfloat16 deltas and float32 anchors give float32 boxes. They are not clipped to the
    image. An anchor without extent gives a box without extent.

    Raises a `ValueError` for weights that are not positive.

    >>> decode_boxes(jnp.array([[0.5, 0.0, 0.0, 0.0]]), jnp.array([[0.0, 0.0, 4.0, 4.0]])).tolist()
    [[2.0, 0.0, 6.0, 4.0]]
    """
    wx, wy, ww, wh = _checked(weights)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centres_and_sizes(anchors)
    dx, dy, dw, dh = upcast(deltas).T  # each (n,)
    cx = dx / wx * anchor_width + anchor_cx  # cx = (dx / wx) aw + acx
    cy = dy / wy * anchor_height + anchor_cy
    # w = exp(min(dw / ww, MAX_LOG_SCALE)) aw
    half_width = 0.5 * (jnp.exp(jnp.minimum(dw / ww, MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (jnp.exp(jnp.minimum(dh / wh, MAX_LOG_SCALE)) * anchor_height)
    corners = [cx - half_width, cy - half_height, cx + half_width, cy + half_height]
    return jnp.stack(corners, axis=1).astype(anchors.dtype)
