"""Elementwise losses. The caller weights and reduces them.

Computes in float32 or higher and returns the dtype of the first argument.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._boxes import (
    EPSILON,
    _aspect_angle,
    _aspect_penalty,
    _corners,
    _enclosure,
    _intersection_and_union,
    _ratio,
    _squared_centre_distance,
    upcast,
)


def smooth_l1_loss(
    pred: Float[Array, "*shape"], target: Float[Array, "*shape"], *, beta: float = 1.0
) -> Float[Array, "*shape"]:
    """Smooth L1 loss: `d² / (2 beta)` where `|d| < beta`, and `|d| - beta / 2` elsewhere, with `d = pred - target`.

    With `beta = 0` it is the absolute error, with gradient 0 at 0. Raises a `ValueError` for a negative `beta`.
    Girshick 2015, https://arxiv.org/abs/1504.08083, equation 3, which has `beta = 1`.

    >>> smooth_l1_loss(jnp.array([0.0, 0.5, 3.0]), jnp.zeros(3), beta=1.0).tolist()
    [0.0, 0.125, 2.5]
    """
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    difference = upcast(pred) - upcast(target)
    distance = difference * jnp.sign(difference)  # |d| with gradient 0 at 0; that of `abs` is 1
    loss = distance if beta == 0 else jnp.where(distance < beta, 0.5 * difference**2 / beta, distance - 0.5 * beta)
    return loss.astype(pred.dtype)


def sigmoid_focal_loss(
    logits: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*shape"]:
    """Focal loss: binary cross entropy times `(1 - p_t)**gamma`, which down-weights well-classified examples.

    `targets` are in 0..1. Positives have weight `alpha` and negatives `1 - alpha`; with `alpha=None`, both have weight
    1. The loss and its gradients are finite for logits of any size. Raises a `ValueError` unless `0 <= alpha <= 1` and
    `gamma >= 0`. Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5.

    >>> sigmoid_focal_loss(jnp.array([0.0, 4.0]), jnp.array([1.0, 1.0]), alpha=None, gamma=2.0).round(5).tolist()
    [0.17328999936580658, 9.999999747378752e-06]
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, or be None for equal weights, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    x, t = upcast(logits), upcast(targets)
    # 1 - p_t = σ(x) (1 - t) + σ(-x) t. Computing σ(-x) as 1 - σ(x) loses precision to cancellation.
    one_minus_pt = jax.nn.sigmoid(x) * (1 - t) + jax.nn.sigmoid(-x) * t
    # At 0 the loss is 0, but a power with gamma < 1 has an infinite gradient there.
    modulation = jnp.where(one_minus_pt > 0, jnp.where(one_minus_pt > 0, one_minus_pt, 1) ** gamma, 0)
    cross_entropy = t * jax.nn.softplus(-x) + (1 - t) * jax.nn.softplus(x)  # -t log σ(x) - (1 - t) log(1 - σ(x))
    loss = cross_entropy * modulation
    if alpha is not None:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    return loss.astype(logits.dtype)


def _loss_terms(boxes_a, boxes_b):
    """Corners of both, their intersection and union, and the width and height of the enclosing box."""
    a, b = _corners(boxes_a), _corners(boxes_b)
    return a, b, *_intersection_and_union(a, b), *_enclosure(a, b)


def giou_loss(boxes_a: Float[Array, "n 4"], boxes_b: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """`1 - GIoU` of corresponding boxes in `boxes_a` and `boxes_b`, in 0..2.

    Areas of about 1e-7 and below count as 0: the loss of two such boxes at the same position is 1, with gradient 0.
    Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630.

    >>> giou_loss(jnp.array([[0.0, 0.0, 1.0, 1.0]]), jnp.array([[3.0, 0.0, 4.0, 1.0]])).tolist()
    [1.5]
    """
    _, _, intersection, union, width, height = _loss_terms(boxes_a, boxes_b)
    enclosing = width * height  # C, the area of the smallest box that encloses both
    giou = _ratio(intersection, union + EPSILON) - _ratio(enclosing - union, enclosing + EPSILON)
    return (1 - giou).astype(boxes_a.dtype)


def _diou_loss_and_iou(boxes_a, boxes_b):
    a, b, intersection, union, width, height = _loss_terms(boxes_a, boxes_b)
    iou = _ratio(intersection, union + EPSILON)
    return 1 - iou + _squared_centre_distance(a, b) / (width**2 + height**2 + EPSILON), iou  # 1 - IoU + ρ² / c²


def diou_loss(boxes_a: Float[Array, "n 4"], boxes_b: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """`1 - DIoU` of corresponding boxes in `boxes_a` and `boxes_b`, in 0..2.

    Areas of about 1e-7 and below count as 0: the loss of two such boxes at the same position is 1, with gradient 0.
    Zheng et al. 2020, https://arxiv.org/abs/1911.08287, equation 8.

    >>> diou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[4.0, 0.0, 6.0, 2.0]])).tolist()
    [1.399999976158142]
    """
    return _diou_loss_and_iou(boxes_a, boxes_b)[0].astype(boxes_a.dtype)


def ciou_loss(boxes_a: Float[Array, "n 4"], boxes_b: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """`1 - CIoU` of corresponding boxes in `boxes_a` and `boxes_b`: `diou_loss` plus an aspect ratio penalty.

    The weight of the penalty is a constant in the gradient. A box of height 0 counts as infinitely wide, and a point
    has the aspect ratio of a box of width 0. Zheng et al. 2020, https://arxiv.org/abs/1911.08287, equation 10.

    >>> ciou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[4.0, 0.0, 6.0, 2.0]])).tolist()
    [1.399999976158142]
    """
    loss, iou = _diou_loss_and_iou(boxes_a, boxes_b)
    penalty = _aspect_penalty(_aspect_angle(_corners(boxes_a)), _aspect_angle(_corners(boxes_b)), iou)
    return (loss + penalty).astype(boxes_a.dtype)


def dice_loss(logits: Float[Array, "n s"], targets: Float[Array, "n s"]) -> Float[Array, " n"]:
    """Dice loss `1 - (2 Σ p t + 1) / (Σ p + Σ t + 1)` of each mask, in 0..1, with `p = sigmoid(logits)`.

    `targets` are coverages in 0..1, and sums run over the `s` pixels of a mask. The added ones smooth the loss and
    define it for an empty target, where it is near 0 for very negative logits. Milletari et al. 2016,
    https://arxiv.org/abs/1606.04797, in the form of MaskFormer and DETR.

    >>> dice_loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]])).round(4).tolist()
    [0.33329999446868896]
    """
    p, t = jax.nn.sigmoid(upcast(logits)), upcast(targets)
    dice = (2 * (p * t).sum(axis=1) + 1) / (p.sum(axis=1) + t.sum(axis=1) + 1)  # (n,)
    return (1 - dice).astype(logits.dtype)
