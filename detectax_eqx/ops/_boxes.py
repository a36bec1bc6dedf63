"""Boxes `(x0, y0, x1, y1)` in pixels: areas, clipping, conversions and pairwise overlaps.

Computes in float32 or higher and returns the dtype of the input. Areas are the exception: those of half-precision boxes
are float32, since the area of a box of 256×256 pixels overflows float16.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from .._xla import rounded_product


# Keeps the distance terms of DIoU and CIoU finite for coinciding points. The value is torchvision's.
EPSILON = 1e-7


def upcast(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Converts half precision to float32; returns float32 and float64 unchanged.

    >>> upcast(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


@jax.custom_jvp
def _ratio(x, y):
    """`x / y`, and 0 with a zero gradient where `y` is 0.

    Has a custom derivative because the usual one squares `y`, which underflows for tiny boxes.
    """
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


@_ratio.defjvp
def _ratio_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    ratio = _ratio(x, y)
    return ratio, jnp.where(y == 0, 0, (dx - ratio * dy) / jnp.where(y == 0, 1, y))  # d(x / y) = (dx - x / y dy) / y


def _corners(boxes):
    """Splits boxes into their four coordinates, each `(n,)`, at least float32."""
    boxes = upcast(boxes)
    return boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3]


def _area(corners):
    x0, y0, x1, y1 = corners
    return rounded_product(x1 - x0, y1 - y0)


def _intersection(a, b):
    """Area of intersection. `a` and `b` are corners that broadcast against each other."""
    width = jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0])
    height = jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1])
    return jnp.where((width > 0) & (height > 0), rounded_product(width, height), 0)


def _intersection_and_union(a, b):
    intersection = _intersection(a, b)
    return intersection, _area(a) + _area(b) - intersection  # |A ∪ B| = |A| + |B| - |A ∩ B|


def _enclosure(a, b):
    """Width and height of the smallest box that encloses both."""
    return jnp.maximum(a[2], b[2]) - jnp.minimum(a[0], b[0]), jnp.maximum(a[3], b[3]) - jnp.minimum(a[1], b[1])


def _squared_centre_distance(a, b):
    dx = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2
    dy = (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    return dx**2 + dy**2  # ρ²


def _aspect_angle(corners):
    """`atan(width / height)`: π/2 for boxes of height 0, and 0 with a zero gradient for points."""
    width, height = corners[2] - corners[0], corners[3] - corners[1]
    known = width**2 + height**2 > 0
    width = jnp.where(known, jnp.where(height < 0, -width, width), 0)
    return jnp.arctan2(width, jnp.where(known, jnp.abs(height), 1))


def _aspect_penalty(angle_a, angle_b, iou):
    """The term `α v` of CIoU. The weight `α` is treated as a constant in the gradient, as in the paper."""
    v = 4 / math.pi**2 * (angle_a - angle_b) ** 2  # 0 for equal aspect ratios, 1 for angles π/2 apart
    return jax.lax.stop_gradient(v / (1 - iou + v + EPSILON)) * v  # α = v / (1 - IoU + v)


def _outer(a, b):
    """Reshapes the corners of two sets of boxes to broadcast to `(n, m)`."""
    return tuple(x[:, None] for x in a), tuple(x[None, :] for x in b)  # (n, 1) and (1, m)


def box_area(boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """Area `(x1 - x0) * (y1 - y0)` of each box, in square pixels.

    A box without extent has area 0. A box whose corners are swapped along one axis has a negative area. Areas of
    float16 and bfloat16 boxes are float32.

    >>> box_area(jnp.array([[0.0, 0.0, 4.0, 3.0], [2.0, 2.0, 2.0, 9.0]])).tolist()
    [12.0, 0.0]
    """
    return _area(_corners(boxes))


def clip_boxes(
    boxes: Float[Array, "n 4"], image_size: Real[Array | np.ndarray, "2"] | tuple[float, float]
) -> Float[Array, "n 4"]:
    """Clips boxes to the image: x to `0..width`, y to `0..height`.

    `image_size` is `(height, width)` in the pixels of the boxes; an array may be traced. A box that lies entirely
    outside the image becomes a degenerate box on the border.

    >>> clip_boxes(jnp.array([[-5.0, 2.0, 40.0, 60.0]]), (50, 30)).tolist()
    [[0.0, 2.0, 30.0, 50.0]]
    """
    height, width = image_size[0], image_size[1]
    limit = jnp.stack([jnp.asarray(side, boxes.dtype) for side in (width, height, width, height)])  # (4,)
    return jnp.clip(boxes, 0, limit[None, :])


def xyxy_to_cxcywh(boxes: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    """Converts corners `(x0, y0, x1, y1)` to centre and size `(cx, cy, w, h)`.

    >>> xyxy_to_cxcywh(jnp.array([[1.0, 2.0, 5.0, 8.0]])).tolist()
    [[3.0, 5.0, 4.0, 6.0]]
    """
    x0, y0, x1, y1 = _corners(boxes)
    return jnp.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1).astype(boxes.dtype)


def cxcywh_to_xyxy(boxes_cxcywh: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    """Converts centre and size `(cx, cy, w, h)` to corners `(x0, y0, x1, y1)`.

    >>> cxcywh_to_xyxy(jnp.array([[3.0, 5.0, 4.0, 6.0]])).tolist()
    [[1.0, 2.0, 5.0, 8.0]]
    """
    cx, cy, w, h = _corners(boxes_cxcywh)
    corners = [cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h]
    return jnp.stack(corners, axis=1).astype(boxes_cxcywh.dtype)


def xyxy_to_xywh(boxes: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    """Converts corners `(x0, y0, x1, y1)` to corner and size `(x0, y0, w, h)`, the format of COCO files.

    >>> xyxy_to_xywh(jnp.array([[1.0, 2.0, 5.0, 8.0]])).tolist()
    [[1.0, 2.0, 4.0, 6.0]]
    """
    x0, y0, x1, y1 = _corners(boxes)
    return jnp.stack([x0, y0, x1 - x0, y1 - y0], axis=1).astype(boxes.dtype)


def xywh_to_xyxy(boxes_xywh: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    """Converts corner and size `(x0, y0, w, h)`, the format of COCO files, to corners `(x0, y0, x1, y1)`.

    >>> xywh_to_xyxy(jnp.array([[1.0, 2.0, 4.0, 6.0]])).tolist()
    [[1.0, 2.0, 5.0, 8.0]]
    """
    x, y, w, h = _corners(boxes_xywh)
    return jnp.stack([x, y, x + w, y + h], axis=1).astype(boxes_xywh.dtype)


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every box in `a` with every box in `b`, in 0..1.

    Bit-identical to torchvision's `box_iou` in float32, except that a pair without area has IoU 0 instead of NaN.

    >>> a, b = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[1.0, 0.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    >>> pairwise_iou(a, b).tolist()
    [[0.3333333432674408, 0.0]]
    """
    return _ratio(*_intersection_and_union(*_outer(_corners(a), _corners(b)))).astype(a.dtype)  # (n, m)


def pairwise_ioa(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over the area of `b`: the fraction of each box in `b` that each box in `a` covers, in 0..1.

    The result is 0 for boxes in `b` without area.

    >>> a, b = jnp.array([[0.0, 0.0, 4.0, 4.0]]), jnp.array([[2.0, 0.0, 6.0, 4.0], [0.0, 0.0, 1.0, 1.0]])
    >>> pairwise_ioa(a, b).tolist()
    [[0.5, 1.0]]
    """
    a_corners, b_corners = _outer(_corners(a), _corners(b))
    return _ratio(_intersection(a_corners, b_corners), _area(b_corners)).astype(a.dtype)  # (n, m)


def pairwise_giou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Generalised IoU, in -1..1: IoU minus the fraction of the enclosing box that neither box covers.

    The result is 0 for pairs whose enclosing box has no area. Rezatofighi et al. 2019,
    https://arxiv.org/abs/1902.09630.

    >>> a, b = jnp.array([[0.0, 0.0, 1.0, 1.0]]), jnp.array([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
    >>> pairwise_giou(a, b).tolist()
    [[1.0, -0.5]]
    """
    a_corners, b_corners = _outer(_corners(a), _corners(b))
    intersection, union = _intersection_and_union(a_corners, b_corners)
    width, height = _enclosure(a_corners, b_corners)
    enclosing = rounded_product(jnp.maximum(width, 0), jnp.maximum(height, 0))  # C, (n, m)
    return (_ratio(intersection, union) - _ratio(enclosing - union, enclosing)).astype(a.dtype)  # IoU - (C - U) / C


def _pairwise_diou_and_iou(a_corners, b_corners):
    iou = _ratio(*_intersection_and_union(a_corners, b_corners))
    width, height = _enclosure(a_corners, b_corners)
    squared_diagonal = jnp.maximum(width, 0) ** 2 + jnp.maximum(height, 0) ** 2 + EPSILON
    return iou - _squared_centre_distance(a_corners, b_corners) / squared_diagonal, iou  # IoU - ρ² / c²


def pairwise_diou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Distance IoU, in -1..1: IoU minus the squared centre distance over the squared diagonal of the enclosing box.

    The result is 0 for two equal boxes without extent. Zheng et al. 2020, https://arxiv.org/abs/1911.08287, equation 7.

    >>> a, b = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    >>> pairwise_diou(a, b).tolist()
    [[1.0, -0.4000000059604645]]
    """
    return _pairwise_diou_and_iou(*_outer(_corners(a), _corners(b)))[0].astype(a.dtype)


def pairwise_ciou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Complete IoU: distance IoU minus a penalty for different aspect ratios.

    A box of height 0 counts as infinitely wide, and a point has the aspect ratio of a box of width 0. Zheng et al.
    2020, https://arxiv.org/abs/1911.08287, equation 10.

    >>> pairwise_ciou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]])).tolist()
    [[1.0]]
    """
    a_corners, b_corners = _corners(a), _corners(b)
    diou, iou = _pairwise_diou_and_iou(*_outer(a_corners, b_corners))
    penalty = _aspect_penalty(_aspect_angle(a_corners)[:, None], _aspect_angle(b_corners)[None, :], iou)
    return (diou - penalty).astype(a.dtype)
