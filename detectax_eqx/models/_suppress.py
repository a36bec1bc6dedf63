"""The last step of every detector with non-maximum suppression: from candidates to detections."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from .._types import Detections
from ..ops import nms_indices


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
