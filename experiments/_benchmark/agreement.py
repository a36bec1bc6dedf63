"""Checks that both sides computed the same before anything is timed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .worker import Arrays


# The tolerances of `make parity` for detectors; boxes in pixels.
MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE, MIN_MASK_IOU = 0.05, 1e-4, 0.99


class Disagreement(RuntimeError):
    """The two sides computed different results, so their times cannot be compared."""


def require_close(ours: Arrays, theirs: Arrays, *, atol: float = 1e-4, in_norm: bool = False) -> None:
    """Raises a `Disagreement` unless the arrays are equal within `atol`, relative to the largest value if above 1.

    - `in_norm`: compares norms instead, `|ours - theirs| <= atol * |theirs|`; for gradients of whole networks.
    """
    if ours.keys() != theirs.keys():
        raise Disagreement(f"ours has {sorted(ours)}, torchvision has {sorted(theirs)}")
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            raise Disagreement(f"{name}: shape {ours[name].shape}, torchvision's {expected.shape}")
        a, b = ours[name].astype(np.float64), expected.astype(np.float64)
        worst = np.abs(a - b).max(initial=0) / np.abs(b).max(initial=1)
        if in_norm:
            worst = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not worst <= atol:  # NaN disagrees
            raise Disagreement(f"{name}: differs from torchvision's by {worst:.2g}, more than {atol:g}")


class Agreement(NamedTuple):
    """How closely detections agree: their number and the largest differences."""

    detections: int
    box: float
    score: float
    mask_iou: float | None


def compare_detections(ours: Sequence[Arrays], theirs: Sequence[Arrays]) -> Agreement:
    """Pairs the detections in each image, and raises a `Disagreement` unless they agree.

    `masks` are bit-packed full-image masks.
    """
    total, box, score, ious = 0, 0.0, 0.0, [1.0]
    for image, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if len(a["scores"]) != len(b["scores"]):
            raise Disagreement(f"image {image}: {len(a['scores'])} detections, torchvision's {len(b['scores'])}")
        order = _order(a, b)
        wrong, total = int((a["labels"] != b["labels"][order]).sum()), total + len(order)
        box = float(np.maximum(box, np.abs(a["boxes"] - b["boxes"][order]).max(initial=0)))
        score = float(np.maximum(score, np.abs(a["scores"] - b["scores"][order]).max(initial=0)))
        if "masks" in b:
            ious += [_mask_iou(x, y) for x, y in zip(a["masks"], b["masks"][order], strict=True)]
        close = box <= MAX_BOX_DIFFERENCE and score <= MAX_SCORE_DIFFERENCE and min(ious) >= MIN_MASK_IOU
        if wrong or not close:
            raise Disagreement(
                f"image {image}: {wrong} of {len(order)} detections have another label, boxes differ by "
                f"{box:.2g} px, scores by {score:.2g}, least mask IoU {min(ious):.4f}"
            )
    if total == 0:
        raise Disagreement("neither side detected anything: the comparison shows nothing")
    return Agreement(total, box, score, min(ious) if "masks" in theirs[0] else None)


def compare_losses(ours: Sequence[Arrays], theirs: Sequence[Arrays], *, rtol: float) -> None:
    """Raises a `Disagreement` unless the averages of every loss over at least two steps agree.

    Each side samples anchors and proposals at random: averages may differ by four standard errors plus `rtol`.
    """
    if ours[0].keys() != theirs[0].keys():
        raise Disagreement(f"ours has losses {sorted(ours[0])}, torchvision has {sorted(theirs[0])}")
    for name in theirs[0]:
        a, b = (np.array([float(step[name]) for step in side]) for side in (ours, theirs))
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        if not abs(a.mean() - b.mean()) <= 4 * error + rtol * abs(b.mean()):
            raise Disagreement(
                f"{name}: {a.mean():.4f} on average, torchvision's {b.mean():.4f}, standard error {error:.4f}"
            )


def _order(a: Arrays, b: Arrays) -> list[int]:
    """Returns the row of `b` for each row of `a`. Rows whose scores differ by rounding may be swapped."""
    free, order = set(range(len(b["scores"]))), []
    for box, label in zip(a["boxes"], a["labels"], strict=True):
        distances = np.abs(b["boxes"] - box).max(axis=1) + 1e6 * (b["labels"] != label)
        order.append(min(free, key=lambda row: distances[row]))
        free.remove(order[-1])
    return order


def _mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.bitwise_count(a | b).sum()
    return float(np.bitwise_count(a & b).sum() / union) if union else 1.0
