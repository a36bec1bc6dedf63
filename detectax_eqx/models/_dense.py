"""What dense detectors share: towers of convolutions, anchors of all levels, and the choice of the best predictions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from .._types import Detections
from ..nn import Conv2d, Initializer, Norm, relu
from ..ops import anchor_grid, clip_boxes, nms_indices, sigmoid_focal_loss


# The rare foreground starts with this probability: Lin et al. 2017 (arXiv:1708.02002), section 3.3.
PRIOR = 0.01


class ConvTower(eqx.Module):
    """3×3 convolutions of one width, each followed by a norm, if there is one, and a ReLU."""

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
    """The layer with a bias that gives each class the probability `PRIOR` where the features say nothing."""
    bias = jnp.full(class_logits.weight.shape[0], -math.log((1 - PRIOR) / PRIOR), class_logits.weight.dtype)
    return eqx.tree_at(lambda conv: conv.bias, class_logits, bias)


def by_anchor(x: Float[Array, "_ h w"], num_values: int) -> Float32[Array, "a {num_values}"]:
    """A head's map as a row per anchor: cells row by row, the anchors of a cell, then their values, in float32."""
    return rearrange(x, "(a v) h w -> (h w a) v", v=num_values).astype(jnp.float32)


def maps_by_anchor(x: Float[Array, "_ h w"], num_classes: int) -> Float[Array, "a {num_classes} p"]:
    """A head's map of class logits, for each of a cell's anchors and each class: the `p` cells, row by row."""
    return rearrange(x, "(a k) h w -> a k (h w)", k=num_classes)


def level_anchors(
    features: Sequence[Float[Array, "c _ _"]],
    canvas: tuple[int, int],
    *,
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
) -> tuple[Float[Array, "_ 4"], ...]:
    """The anchors of each level in canvas pixels; `sizes` has a tuple per level.

    The stride is torchvision's: the whole quotient of the sides, which for a level of odd size is not a power of two.
    """
    if len(features) != len(sizes):
        raise ValueError(f"anchor_sizes has {len(sizes)} levels, the backbone {len(features)}.")
    return tuple(
        anchor_grid(
            (x.shape[1], x.shape[2]),
            stride=(canvas[0] // x.shape[1], canvas[1] // x.shape[2]),
            sizes=of_level,
            aspect_ratios=aspect_ratios,
        )
        for x, of_level in zip(features, sizes, strict=True)
    )


@dataclass(frozen=True)
class DenseSelection:
    """Which predictions a dense detector keeps; each detector has defaults of its own.

    - `score_threshold`: detections need a score above it, 0..1.
    - `nms_threshold`: IoU above which the lower of two detections of a class is dropped.
    - `max_detections`: detections per image.
    - `top_n`: candidates per level before suppression.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 300
    top_n: int = 1000


def dense_detections(
    scores: Callable[[Float[Array, "a k"], Array], Float[Array, "a k"]],
    decode: Callable[[Float[Array, "a 4"], Float[Array, "a 4"]], Float[Array, "a 4"]],
    levels: Sequence[tuple[Float[Array, "_ k _"], Float[Array, "_ _"], Float[Array, "_ 4"], Float[Array, "_ 4"]]],
    canvas_size: Int32[Array, " 2"],
    selection: DenseSelection,
) -> Detections:
    """The best predictions of all levels after suppression within each class, in canvas pixels.

    - `scores`: of class logits and of what else is known of an anchor, 0..1; it must rise with each logit.
    - `decode`: deltas and anchors to boxes, which are clipped to the picture of `(height, width)` `canvas_size`.
    - `levels`: class logits of `maps_by_anchor`, and with a row per anchor, cells row by row: anything else that
      `scores` needs, deltas and anchors.

    torchvision's rule: of each level the `top_n` best of all pairs of anchor and class above the threshold.
    """
    boxes, best, labels = [], [], []
    for logits, more, deltas, anchors in levels:
        num_anchors, num_classes, num_cells = logits.shape
        # A pair among the best `top_n` is of an anchor whose best pair is: no more anchors need be looked at.
        highest = rearrange(logits.max(axis=1), "a p -> (p a) 1").astype(jnp.float32)
        _, rows = lax.top_k(scores(highest, more)[:, 0], min(selection.top_n, len(highest)))
        rows = jnp.sort(rows)  # (r,), r = min(top_n, p a)
        first = rows % num_anchors * num_classes * num_cells + rows // num_anchors  # row = cell * anchors + anchor
        step = num_cells * jnp.arange(num_classes, dtype=rows.dtype)[None]
        chosen = logits.reshape(-1)[first[:, None] + step].astype(jnp.float32)  # (r, k)
        pairs = scores(chosen, more[rows]).reshape(-1)  # (r k)
        level_scores, pair = lax.top_k(pairs, min(selection.top_n, pairs.shape[0]))
        row = rows[pair // num_classes]  # pair = row * k + class
        boxes.append(clip_boxes(decode(deltas[row], anchors[row]), canvas_size.astype(jnp.float32)))
        best.append(level_scores)
        labels.append((pair % num_classes).astype(jnp.int32))
    all_boxes, all_scores, all_labels = jnp.concatenate(boxes), jnp.concatenate(best), jnp.concatenate(labels)
    keep, valid = nms_indices(
        all_boxes,
        all_scores,
        all_scores > selection.score_threshold,
        iou_threshold=selection.nms_threshold,
        max_outputs=selection.max_detections,
        labels=all_labels,
    )
    return Detections(
        jnp.where(valid[:, None], all_boxes[keep], 0.0),
        jnp.where(valid, all_scores[keep], 0.0),
        jnp.where(valid, all_labels[keep], 0),
        valid,
    )


def class_loss(
    levels: Sequence[Float[Array, "_ k _"]], labels: Int32[Array, " n"], counted: Bool[Array, " n"]
) -> Float32[Array, ""]:
    """The focal loss of all classes and all anchors that are `counted`, added up.

    - `levels`: class logits of `maps_by_anchor`. `labels`: of the `n` anchors of all levels, cells row by row; -1 for
      an anchor without an object.

    Large as they are, the logits stay where they lie: labels go to them.
    """
    total, first = jnp.zeros((), jnp.float32), 0
    for logits in levels:
        num_anchors, num_classes, num_cells = logits.shape
        of_level = slice(first, first + num_anchors * num_cells)
        own, used = (rearrange(x[of_level], "(p a) -> a 1 p", a=num_anchors) for x in (labels, counted))
        wanted = own == jnp.arange(num_classes, dtype=own.dtype)[None, :, None]  # (a, k, p)
        losses = sigmoid_focal_loss(logits.astype(jnp.float32), wanted.astype(jnp.float32))
        total += jnp.where(used, losses, 0.0).sum()
        first = of_level.stop
    return total
