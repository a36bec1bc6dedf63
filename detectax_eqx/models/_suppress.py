"""The last step of every detector with non-maximum suppression: from candidates to detections."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from .._types import Detections
from ..ops import nms_indices
from ._rpn import has_area


def suppress(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int32[Array, " n"],
    valid: Bool[Array, " n"],
    *,
    nms_threshold: float,
    max_detections: int,
) -> Detections:
    """Returns the best valid candidates after non-maximum suppression per class; the remaining rows are zeros.

    >>> boxes = jnp.array([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.0]])
    >>> labels, valid = jnp.array([2, 2]), jnp.array([True, True])
    >>> found = suppress(boxes, jnp.array([0.5, 0.75]), labels, valid, nms_threshold=0.5, max_detections=2)
    >>> found.scores.tolist(), found.labels.tolist(), found.valid.tolist()
    ([0.75, 0.0], [2, 0], [True, False])
    """
    keep, kept = nms_indices(
        boxes, scores, valid, iou_threshold=nms_threshold, max_outputs=max_detections, labels=labels
    )
    return Detections(
        jnp.where(kept[:, None], boxes[keep], 0.0),
        jnp.where(kept, scores[keep], 0.0),
        jnp.where(kept, labels[keep], 0),
        kept,
    )


def without_empty(detections: Detections) -> Detections:
    """Drops the detections of an image whose boxes have no area, and moves the others to the front, as Detectron2 does.

    >>> boxes, labels = jnp.array([[4.0, 0.0, 4.0, 8.0], [0.0, 0.0, 8.0, 7.0]]), jnp.array([2, 3])
    >>> found = without_empty(Detections(boxes, jnp.array([0.75, 0.5]), labels, jnp.array([True, True])))
    >>> found.scores.tolist(), found.labels.tolist(), found.valid.tolist()
    ([0.5, 0.0], [3, 0], [True, False])
    """
    kept = detections.valid & has_area(detections.boxes)
    order = jnp.argsort(~kept, stable=True)
    moved = replace(jax.tree.map(lambda x: x[order], detections), valid=kept[order])
    return replace(
        moved,
        boxes=jnp.where(moved.valid[:, None], moved.boxes, 0.0),
        scores=jnp.where(moved.valid, moved.scores, 0.0),
        labels=jnp.where(moved.valid, moved.labels, 0),
    )
