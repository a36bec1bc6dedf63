"""Losses over sets: each target is matched to one query by an optimal assignment, inside the compiled step.

Carion et al. 2020 (DETR, https://arxiv.org/abs/2005.12872), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from .._types import Targets
from ..ops import cxcywh_to_xyxy, giou_loss, linear_assignment, pairwise_giou, pairwise_iou, upcast, xyxy_to_cxcywh
from ._queries import Queries


# Of the focal loss by which the classes are matched (Deformable DETR).
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


def relative_boxes(targets: Targets, canvas: tuple[int, int]) -> Float[Array, "t 4"]:
    """The targets' boxes `cxcywh` relative to a canvas of `(height, width)`."""
    boxes = upcast(jnp.asarray(targets.boxes))
    return xyxy_to_cxcywh(boxes / _scale(canvas, boxes))


def _scale(canvas: tuple[int, int], like: Float[Array, "n 4"]) -> Float[Array, "1 4"]:
    return jnp.array([[canvas[1], canvas[0]] * 2], like.dtype)


def matching_cost(
    predicted: Queries, targets: Targets, canvas: tuple[int, int], weights: SetWeights
) -> Float[Array, "t q"]:
    """Cost of matching each target to each query: the focal loss of its class, the L1 distance and -GIoU of boxes.

    The cost of a class is the focal loss of a query that is matched, less that of one that is not.
    """
    logits = upcast(predicted.logits).T[targets.labels]  # (t, q)
    p = jax.nn.sigmoid(logits)
    matched = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * jax.nn.softplus(-logits)
    unmatched = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * jax.nn.softplus(logits)
    boxes = upcast(predicted.boxes_cxcywh)
    wanted = relative_boxes(targets, canvas).astype(boxes.dtype)
    l1 = jnp.abs(wanted[:, None] - boxes[None]).sum(axis=2)
    scale = _scale(canvas, boxes)  # GIoU does not depend on the scale, except near 0
    giou = pairwise_giou(cxcywh_to_xyxy(wanted) * scale, cxcywh_to_xyxy(boxes) * scale)
    return weights.classification * (matched - unmatched) + weights.l1 * l1 - weights.giou * giou


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
    predicted: Queries, queries: Int32[Array, " t"], labels: Int32[Array, " t"], ious: Float[Array, " t"]
) -> Float[Array, ""]:
    """Sums the binary cross entropy of all queries and classes, whose targets are mixtures of score and IoU.

    - `queries`: of each target, or -1. `labels`, `ious`: the target's class, and its IoU with its query's box.

    With the score `p` of the pair of a matched query and its target's class, `t = max(p**0.25 IoU**0.75, 0.01)` is its
    target, without a gradient. The loss is `-t log p - (1 - t) log(1 - p)` there, and `-p² log(1 - p)` for all other
    pairs. The IoU-aware loss of Align-DETR (arXiv:2304.07527) as LW-DETR has it.
    """
    logits = upcast(predicted.logits)
    scores = jax.nn.sigmoid(logits)
    rows = jnp.where(queries >= 0, queries, len(logits))  # those beyond the last are dropped
    share = scores.at[rows, labels].get(mode="fill", fill_value=0.0)
    target = jnp.maximum(share**SCORE_SHARE * ious ** (1 - SCORE_SHARE), LEAST_TARGET)
    target = lax.stop_gradient(target).astype(logits.dtype)
    positive = jnp.zeros_like(logits).at[rows, labels].set(target, mode="drop")
    negative = (scores**2).at[rows, labels].set(1 - target, mode="drop")
    # -log(1 - p) = x - log p
    return (negative * logits + (positive + negative) * jax.nn.softplus(-logits)).sum()


def set_losses(
    predicted: Queries, queries: Int32[Array, " t"], targets: Targets, canvas: tuple[int, int]
) -> dict[str, Float[Array, ""]]:
    """Sums the losses of one set over all targets: `classification`, `l1` and `giou`.

    - `queries`: of each target, or -1.
    """
    matched = queries >= 0
    boxes = upcast(predicted.boxes_cxcywh)[jnp.maximum(queries, 0)]  # (t, 4)
    wanted = relative_boxes(targets, canvas).astype(boxes.dtype)
    # Targets without a query take a box of nonzero extent as a placeholder; their loss is masked out.
    boxes, wanted = (jnp.where(matched[:, None], x, jnp.full_like(x, 0.5)) for x in (boxes, wanted))
    scale = _scale(canvas, boxes)
    corners, wanted_corners = cxcywh_to_xyxy(boxes) * scale, cxcywh_to_xyxy(wanted) * scale
    ious = jax.vmap(lambda a, b: pairwise_iou(a[None], b[None])[0, 0])(lax.stop_gradient(corners), wanted_corners)
    l1 = jnp.abs(boxes - wanted).sum(axis=1)
    return {
        "classification": iou_aware_loss(predicted, queries, jnp.asarray(targets.labels), ious),
        "l1": jnp.where(matched, l1, 0).sum(),
        "giou": jnp.where(matched, giou_loss(corners, wanted_corners), 0).sum(),
    }
