"""Non-maximum suppression in NumPy, for runtimes that have no operator for it."""

import numpy as np
from jaxtyping import Bool, Float, Int


def host_nms(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    valid: Bool[np.ndarray, " n"],
    *,
    iou_threshold: float,
    max_outputs: int,
) -> Int[np.ndarray, " m"]:
    """Class-aware NMS. Returns at most `max_outputs` rows, highest score first, as `ops.nms_indices` does.

    The function depends on NumPy only, so it can be copied into a program without JAX. A box is dropped if its IoU with
    a kept box of the same label is greater than `iou_threshold`. Equal scores are ordered by row. Rows that are not
    `valid` are ignored.

    >>> boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]], np.float32)
    >>> scores, ones = np.array([0.8, 0.9, 0.7], np.float32), np.ones(3, np.int32)
    >>> host_nms(boxes, scores, ones, ones > 0, iou_threshold=0.5, max_outputs=4).tolist()
    [1, 2]
    """
    order = np.flatnonzero(valid)
    order = order[np.argsort(-scores[order], kind="stable")]
    x0, y0, x1, y1 = boxes[order].T
    areas, labels = (x1 - x0) * (y1 - y0), labels[order]
    remains, kept = np.ones(len(order), bool), []
    for i in range(len(order)):
        if not remains[i]:
            continue
        kept.append(order[i])
        if len(kept) == max_outputs:
            break
        width = np.minimum(x1, x1[i]) - np.maximum(x0, x0[i])
        height = np.minimum(y1, y1[i]) - np.maximum(y0, y0[i])
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        union = areas + areas[i] - intersection
        iou = np.where(union > 0, intersection / np.where(union > 0, union, 1), 0)
        remains &= ~((iou > iou_threshold) & (labels == labels[i]))
    return np.array(kept, np.int64)
