"""Shared parts of dense detectors: convolution towers, anchors of all levels, selection, and the class loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._types import Detections
from .._xla import rematerialise
from ..nn import Conv2d, Initializer, Norm, relu
from ..ops import anchor_grid, clip_boxes, sigmoid_focal_loss
from ._rpn import anchor_strides
from ._suppress import suppress, without_empty


# Initial probability of the rare foreground: Lin et al. 2017 (arXiv:1708.02002), section 3.3.
PRIOR = 0.01


class ConvTower(eqx.Module):
    """A stack of 3×3 convolutions of equal width, each followed by an optional norm and a ReLU."""

    convs: tuple[Conv2d, ...]
    norms: tuple[Callable, ...] | None

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        key: PRNGKeyArray,
        init: Initializer,
        norm: Norm | None = None,
        use_bias: bool = True,
    ):
        keys = jr.split(key, depth)
        self.convs = tuple(Conv2d(channels, channels, 3, use_bias=use_bias, init=init, key=k) for k in keys)
        self.norms = None if norm is None else tuple(norm(channels) for _ in keys)

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "c h w"]:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = relu(x if self.norms is None else self.norms[i](x))
        return x


def start_rare(class_logits: Conv2d) -> Conv2d:
    """Sets the bias so that each class has probability `PRIOR` where the features contribute nothing."""
    # sigmoid(-log((1 - p) / p)) = p
    bias = jnp.full(class_logits.weight.shape[0], -math.log((1 - PRIOR) / PRIOR), class_logits.weight.dtype)
    return eqx.tree_at(lambda conv: conv.bias, class_logits, bias)


def by_anchor(x: Float[Array, "_ h w"], num_values: int) -> Float32[Array, "a {num_values}"]:
    """Rearranges a head's map to one float32 row per anchor: cells in row-major order, then the anchors of a cell."""
    return rearrange(x, "(a v) h w -> (h w a) v", v=num_values).astype(jnp.float32)


def maps_by_anchor(x: Float[Array, "_ h w"], num_classes: int) -> Float[Array, "a {num_classes} p"]:
    """Rearranges a map of class logits to (anchors per cell, classes, cells), with `p` cells in row-major order."""
    return rearrange(x, "(a k) h w -> a k (h w)", k=num_classes)


def level_anchors(
    features: Sequence[Float[Array, "c _ _"]],
    canvas: tuple[int, int],
    *,
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    strides: tuple[int, ...] | None = None,
    rounded: bool = True,
) -> tuple[Float[Array, "_ 4"], ...]:
    """Returns the anchors of each level in canvas pixels; `sizes` has one tuple per level.

    - `strides`, `rounded`: see `anchor_strides` and `rounded_anchors` of `RPN`.
    """
    if len(features) != len(sizes):
        raise ValueError(f"anchor_sizes has {len(sizes)} levels, but the backbone has {len(features)}.")
    return tuple(
        anchor_grid(
            (x.shape[1], x.shape[2]),
            stride=stride,
            sizes=level_sizes,
            aspect_ratios=aspect_ratios,
            rounded=rounded,
        )
        for x, stride, level_sizes in zip(features, anchor_strides(features, canvas, strides), sizes, strict=True)
    )


@dataclass(frozen=True)
class DenseSelection:
    """Which predictions a dense detector keeps; each detector has its own defaults.

    - `score_threshold`: score in 0..1 above which detections are kept.
    - `nms_threshold`: IoU above which the lower-scoring of two detections of a class is dropped.
    - `max_detections`: maximum number of detections per image.
    - `top_n`: number of candidates per level before suppression.
    - `clip_last`: whether boxes are clipped to the image only after suppression, as in Detectron2, where boxes that are
      then without area count among the `max_detections` and are dropped.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 300
    top_n: int = 1000
    clip_last: bool = False


def dense_detections(
    scores: Callable[[Float[Array, "a k"], Array], Float[Array, "a k"]],
    decode: Callable[[Float[Array, "a 4"], Float[Array, "a 4"]], Float[Array, "a 4"]],
    levels: Sequence[tuple[Float[Array, "_ k _"], Float[Array, "_ _"], Float[Array, "_ 4"], Float[Array, "_ 4"]]],
    canvas_size: Int32[Array, " 2"],
    selection: DenseSelection,
) -> Detections:
    """Selects the best predictions of all levels with non-maximum suppression per class, in canvas pixels.

    - `scores`: maps class logits and the extra inputs of each anchor to scores in 0..1; must increase with each logit.
    - `decode`: maps deltas and anchors to boxes.
    - `canvas_size`: `(height, width)` of the image, to which boxes are clipped.
    - `levels`: for each level, class logits from `maps_by_anchor`, then three arrays with one row per anchor, cells in
      row-major order: the extra inputs of `scores`, the deltas and the anchors.

    As in torchvision, each level contributes its `top_n` best pairs of anchor and class above the threshold.
    """
    image_size = canvas_size.astype(jnp.float32)
    boxes, best, labels = [], [], []
    for logits, extra, deltas, anchors in levels:
        num_anchors, num_classes, num_cells = logits.shape
        # The `top_n` best pairs belong to the `top_n` anchors with the best single pair: only those are scored in full.
        highest = rearrange(logits.max(axis=1), "a p -> (p a) 1").astype(jnp.float32)
        _, rows = lax.top_k(scores(highest, extra)[:, 0], min(selection.top_n, len(highest)))
        rows = jnp.sort(rows)  # (r,), r = min(top_n, p a)
        # logits is (a, k, p): class 0 of an anchor lies at anchor * k * p + cell, the next class p entries further.
        first = rows % num_anchors * num_classes * num_cells + rows // num_anchors  # row = cell * anchors + anchor
        offsets = num_cells * jnp.arange(num_classes, dtype=rows.dtype)[None]
        row_logits = logits.reshape(-1)[first[:, None] + offsets].astype(jnp.float32)  # (r, k)
        pairs = scores(row_logits, extra[rows]).reshape(-1)  # (r k)
        level_scores, pair = lax.top_k(pairs, min(selection.top_n, pairs.shape[0]))
        row = rows[pair // num_classes]  # pair = row * k + class
        level_boxes = decode(deltas[row], anchors[row])
        boxes.append(level_boxes if selection.clip_last else clip_boxes(level_boxes, image_size))
        best.append(level_scores)
        labels.append((pair % num_classes).astype(jnp.int32))
    all_boxes, all_scores, all_labels = jnp.concatenate(boxes), jnp.concatenate(best), jnp.concatenate(labels)
    found = suppress(
        all_boxes,
        all_scores,
        all_labels,
        all_scores > selection.score_threshold,
        nms_threshold=selection.nms_threshold,
        max_detections=selection.max_detections,
    )
    if not selection.clip_last:
        return found
    return without_empty(replace(found, boxes=clip_boxes(found.boxes, image_size)))


def class_loss(
    levels: Sequence[Float[Array, "_ k _"]], labels: Int32[Array, " n"], counted: Bool[Array, " n"]
) -> Float32[Array, ""]:
    """Sums the focal loss over all classes and over the anchors that are `counted`.

    - `levels`: class logits from `maps_by_anchor`.
    - `labels`: class of each of the `n` anchors of all levels, cells in row-major order; -1 without an object.

    The logits are large and keep their layout; the labels are rearranged to match.
    """
    total, first = jnp.zeros((), jnp.float32), 0
    for logits in levels:
        num_anchors, num_classes, num_cells = logits.shape
        level = slice(first, first + num_anchors * num_cells)
        level_labels, level_counted = (rearrange(x[level], "(p a) -> a 1 p", a=num_anchors) for x in (labels, counted))
        one_hot = level_labels == jnp.arange(num_classes, dtype=level_labels.dtype)[None, :, None]  # (a, k, p)
        # The factors of the loss, each as large as the logits, are recomputed for the gradient.
        losses = rematerialise(partial(_focal_loss, one_hot), logits)
        total += jnp.where(level_counted, losses, 0.0).sum()
        first = level.stop
    return total


def _focal_loss(one_hot: Bool[Array, "a k p"], logits: Float[Array, "a k p"]) -> Float32[Array, "a k p"]:
    return sigmoid_focal_loss(logits.astype(jnp.float32), one_hot.astype(jnp.float32))
