"""Losses over sets: each target is matched to one query by an optimal assignment, inside the compiled step.

Carion et al. 2020 (DETR, https://arxiv.org/abs/2005.12872), section 3.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from .._types import Targets, WeightedSum
from ..ops import (
    cxcywh_to_xyxy,
    giou_loss,
    linear_assignment,
    pairwise_giou,
    pairwise_iou,
    sigmoid_focal_loss,
    upcast,
    xyxy_to_cxcywh,
)
from ._queries import Frame, Queries, corners_of, sides_of


# Of the focal loss of classes (Deformable DETR).
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# The target of a matched query is score**SCORE_SHARE * IoU**(1 - SCORE_SHARE), and at least LEAST_TARGET (LW-DETR).
SCORE_SHARE, LEAST_TARGET = 0.25, 0.01


@dataclass(frozen=True)
class SetWeights:
    """Weights of the terms of a cost of matching, or of a loss; the defaults are those of matching in RF-DETR.

    - `classification`, `l1`, `giou`: of classes, and of the distance and the overlap of boxes.
    - `mask`, `dice`: of masks, where there are some.
    """

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


# The cost of matching each target to each query by its class, of logits `(q, k)` and labels `(t,)`: `(t, q)`.
ClassCost = Callable[[Float[Array, "q k"], Int32[Array, " t"]], Float[Array, "t q"]]
# The loss of the classes of a set, given the query of each target or -1, its class, and its IoU with the query's box.
ClassLoss = Callable[
    [Float[Array, "q k"], Int32[Array, " t"], Int32[Array, " t"], Float[Array, " t"]], Float[Array, ""]
]


def relative_boxes(targets: Targets, frame: Frame) -> Float[Array, "t 4"]:
    """The targets' boxes `cxcywh` relative to a frame of `(height, width)`."""
    boxes = upcast(jnp.asarray(targets.boxes))
    return xyxy_to_cxcywh(boxes / sides_of(frame, boxes.dtype)[None])


def focal_cost(logits: Float[Array, "q k"], labels: Int32[Array, " t"]) -> Float[Array, "t q"]:
    """The focal loss of a query that is matched, less that of one that is not (Deformable DETR)."""
    logits = logits.T[labels]  # (t, q)
    p = jax.nn.sigmoid(logits)
    matched = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * jax.nn.softplus(-logits)
    unmatched = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * jax.nn.softplus(logits)
    return matched - unmatched


def probability_cost(logits: Float[Array, "q k"], labels: Int32[Array, " t"]) -> Float[Array, "t q"]:
    """Minus the probability of the target's class (DETR)."""
    return -jax.nn.softmax(logits, axis=1).T[labels]


def matching_cost(
    predicted: Queries, targets: Targets, frame: Frame, weights: SetWeights, *, class_cost: ClassCost
) -> Float[Array, "t q"]:
    """Cost of matching each target to each query: that of its class, the L1 distance and -GIoU of boxes.

    - `frame`: `(height, width)` to which the predicted boxes are relative.
    """
    classification = class_cost(upcast(predicted.logits), jnp.asarray(targets.labels))
    boxes = upcast(predicted.boxes_cxcywh)
    wanted = relative_boxes(targets, frame).astype(boxes.dtype)
    l1 = jnp.abs(wanted[:, None] - boxes[None]).sum(axis=2)
    scale = sides_of(frame, boxes.dtype)[None]  # GIoU does not depend on the scale, except near 0
    giou = pairwise_giou(cxcywh_to_xyxy(wanted) * scale, corners_of(boxes) * scale)
    return weights.classification * classification + weights.l1 * l1 - weights.giou * giou


def match_sets(costs: Sequence[Float[Array, "_ t _"]], targets: Targets) -> list[Int32[Array, "_ t"]]:
    """Matches the targets to the queries of many sets, all in one optimal assignment.

    - `costs`: arrays `(sets, targets, queries)`, which may differ in the numbers of sets and of queries.

    Returns the query of each target for each set; -1 for targets that are not valid or that found no query, because
    there are fewer of them.
    """
    counts, capacity = [cost.shape[2] for cost in costs], costs[0].shape[1]
    width = max(capacity, *counts)
    padded = [
        jnp.pad(cost, ((0, 0), (0, 0), (0, width - count)), constant_values=jnp.inf)
        for cost, count in zip(costs, counts, strict=True)
    ]
    # Valid targets first: the assignment takes their number.
    order = jnp.argsort(~jnp.asarray(targets.valid), stable=True)
    count = jnp.asarray(targets.valid).sum(dtype=jnp.int32)
    sets = lax.stop_gradient(jnp.concatenate(padded)[:, order])
    assigned = jax.vmap(linear_assignment, in_axes=(0, None))(sets, count)
    queries = jnp.zeros_like(assigned).at[:, order].set(assigned)
    starts = [sum(len(cost) for cost in costs[:i]) for i in range(len(costs) + 1)]
    return [
        jnp.where(queries[first:last] < count, queries[first:last], -1)
        for first, last, count in zip(starts[:-1], starts[1:], counts, strict=True)
    ]


def iou_aware_loss(
    logits: Float[Array, "q k"], queries: Int32[Array, " t"], labels: Int32[Array, " t"], ious: Float[Array, " t"]
) -> Float[Array, ""]:
    """Sums the binary cross entropy of all queries and classes, whose targets are mixtures of score and IoU.

    With the score `p` of the pair of a matched query and its target's class, `t = max(p**0.25 IoU**0.75, 0.01)` is its
    target, without a gradient. The loss is `-t log p - (1 - t) log(1 - p)` there, and `-p² log(1 - p)` for all other
    pairs. The IoU-aware loss of Align-DETR (arXiv:2304.07527) as LW-DETR has it.
    """
    scores = jax.nn.sigmoid(logits)
    rows = jnp.where(queries >= 0, queries, len(logits))  # those beyond the last are dropped
    share = scores.at[rows, labels].get(mode="fill", fill_value=0.0)
    target = jnp.maximum(share**SCORE_SHARE * ious ** (1 - SCORE_SHARE), LEAST_TARGET)
    target = lax.stop_gradient(target).astype(logits.dtype)
    positive = jnp.zeros_like(logits).at[rows, labels].set(target, mode="drop")
    negative = (scores**2).at[rows, labels].set(1 - target, mode="drop")
    # -log(1 - p) = x - log p
    return (negative * logits + (positive + negative) * jax.nn.softplus(-logits)).sum()


def binary_focal_loss(
    logits: Float[Array, "q k"], queries: Int32[Array, " t"], labels: Int32[Array, " t"], ious: Float[Array, " t"]
) -> Float[Array, ""]:
    """Sums the focal loss of all queries and classes; a matched query is of its target's class (Deformable DETR).

    `ious` is not used.
    """
    rows = jnp.where(queries >= 0, queries, len(logits))  # those beyond the last are dropped
    wanted = jnp.zeros_like(logits).at[rows, labels].set(1, mode="drop")
    return sigmoid_focal_loss(logits, wanted, alpha=FOCAL_ALPHA, gamma=FOCAL_GAMMA).sum()


def no_object_loss(
    logits: Float[Array, "q k"],
    queries: Int32[Array, " t"],
    labels: Int32[Array, " t"],
    ious: Float[Array, " t"],
    *,
    no_object: float,
) -> Float[Array, ""]:
    """Sums the cross entropy of all queries; those without a target have the last class, "no object" (DETR).

    - `no_object`: weight of that class; the others have 1. `ious` is not used.
    """
    last = logits.shape[1] - 1
    rows = jnp.where(queries >= 0, queries, len(logits))  # those beyond the last are dropped
    classes = jnp.full(len(logits), last, labels.dtype).at[rows].set(labels, mode="drop")
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), classes[:, None], axis=1)[:, 0]
    return jnp.where(classes == last, no_object * losses, losses).sum()


def set_losses(
    sets: Sequence[Queries],
    matched: Sequence[Int32[Array, "_ t"]],
    targets: Targets,
    frame: Frame,
    weights: SetWeights,
    count: Float[Array, ""],
    *,
    class_loss: ClassLoss,
    class_count: Float[Array, ""] | None = None,
) -> dict[str, WeightedSum]:
    """Sums the losses of all sets: `loss_class`, `loss_l1` and `loss_giou`, weighted.

    - `matched`: the query of each target in each set, or -1.
    - `count`: what the sums are divided by; `class_count`: what that of classes is divided by, if it is another.
    """
    parts = [
        jax.vmap(lambda one, rows: _losses_of(one, rows, targets, frame, class_loss))(part, queries)
        for part, queries in zip(sets, matched, strict=True)
    ]
    total = jax.tree.map(lambda *sums: jnp.concatenate(sums).sum(), *parts)
    class_count = count if class_count is None else class_count
    return {
        "loss_class": WeightedSum((weights.classification * total["class"]).astype(jnp.float32), class_count),
        "loss_l1": WeightedSum((weights.l1 * total["l1"]).astype(jnp.float32), count),
        "loss_giou": WeightedSum((weights.giou * total["giou"]).astype(jnp.float32), count),
    }


def _losses_of(
    predicted: Queries, queries: Int32[Array, " t"], targets: Targets, frame: Frame, class_loss: ClassLoss
) -> dict[str, Float[Array, ""]]:
    """The losses of one set, summed over all targets."""
    matched = queries >= 0
    boxes = upcast(predicted.boxes_cxcywh)[jnp.maximum(queries, 0)]  # (t, 4)
    wanted = relative_boxes(targets, frame).astype(boxes.dtype)
    # Targets without a query take a box of nonzero extent as a placeholder; their loss is masked out.
    boxes, wanted = (jnp.where(matched[:, None], x, jnp.full_like(x, 0.5)) for x in (boxes, wanted))
    scale = sides_of(frame, boxes.dtype)[None]
    corners, wanted_corners = corners_of(boxes) * scale, cxcywh_to_xyxy(wanted) * scale
    ious = jax.vmap(lambda a, b: pairwise_iou(a[None], b[None])[0, 0])(lax.stop_gradient(corners), wanted_corners)
    l1 = jnp.abs(boxes - wanted).sum(axis=1)
    return {
        "class": class_loss(upcast(predicted.logits), queries, jnp.asarray(targets.labels), ious),
        "l1": jnp.where(matched, l1, 0).sum(),
        "giou": jnp.where(matched, giou_loss(corners, wanted_corners), 0).sum(),
    }
