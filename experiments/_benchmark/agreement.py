"""Whether both sides found the same: nothing is timed before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


Arrays = Mapping[str, np.ndarray]
# What `make parity` asks of detectors.
MAX_BOX_DIFFERENCE = 0.05  # pixels
MAX_SCORE_DIFFERENCE = 1e-4
MIN_MASK_IOU = 0.99


class Disagreement(RuntimeError):
    """The two sides gave different results, so their times do not compare."""


def require_close(ours: Arrays, theirs: Arrays, *, atol: float = 1e-4) -> None:
    """Raises a `Disagreement` unless the arrays are equal to `atol`, relative to the largest value beyond 1."""
    if ours.keys() != theirs.keys():
        raise Disagreement(f"ours gave {sorted(ours)}, torchvision {sorted(theirs)}")
    for name, expected in theirs.items():
        if ours[name].shape != expected.shape:
            raise Disagreement(f"{name}: shape {ours[name].shape}, torchvision's {expected.shape}")
        if expected.size == 0:
            continue
        a, b = ours[name].astype(np.float64), expected.astype(np.float64)
        worst = np.abs(a - b).max() / max(1.0, np.abs(b).max())
        if not worst <= atol:  # NaN disagrees
            raise Disagreement(f"{name}: differs from torchvision's by {worst:.2g}, more than {atol:g}")


def require_close_in_norm(ours: Arrays, theirs: Arrays, *, rtol: float = 5e-3) -> None:
    """Raises a `Disagreement` unless each array differs by at most `rtol` of its norm: for gradients of whole nets."""
    for name, expected in theirs.items():
        worst = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        if not worst <= rtol:
            raise Disagreement(f"{name}: differs from torchvision's by {worst:.2g} of its norm, more than {rtol:g}")


@dataclass(frozen=True)
class Agreement:
    """How closely detections agreed: their number, and the worst differences among them."""

    detections: int
    box: float
    score: float
    mask_iou: float | None


def compare_detections(ours: Arrays, theirs: Arrays) -> Agreement:
    """Pairs the detections of a batch of images; raises a `Disagreement` unless they are the same.

    Arrays have a leading batch axis and a `valid` mask; `masks` are bits of masks on their image.
    """
    total, boxes, scores, ious = 0, [0.0], [0.0], [1.0]
    for image in range(len(theirs["valid"])):
        a, b = (_valid(side, image) for side in (ours, theirs))
        if len(a["scores"]) != len(b["scores"]):
            raise Disagreement(f"image {image}: {len(a['scores'])} detections, torchvision's {len(b['scores'])}")
        order = _order(a, b)
        b = {name: array[order] for name, array in b.items()}
        wrong = int((a["labels"] != b["labels"]).sum())
        total += len(order)
        boxes.append(np.abs(a["boxes"] - b["boxes"]).max(initial=0))
        scores.append(np.abs(a["scores"] - b["scores"]).max(initial=0))
        if "masks" in b:
            ious += [_mask_iou(x, y) for x, y in zip(a["masks"], b["masks"], strict=True)]
        if wrong or boxes[-1] > MAX_BOX_DIFFERENCE or scores[-1] > MAX_SCORE_DIFFERENCE or min(ious) < MIN_MASK_IOU:
            raise Disagreement(
                f"image {image}: {wrong} of {len(order)} detections have another label, boxes differ by "
                f"{boxes[-1]:.2g} px, scores by {scores[-1]:.2g}, least mask IoU {min(ious):.4f}"
            )
    if total == 0:
        raise Disagreement("neither side detected anything: the comparison shows nothing")
    return Agreement(total, float(max(boxes)), float(max(scores)), min(ious) if "masks" in theirs else None)


def compare_losses(ours: Sequence[Arrays], theirs: Sequence[Arrays], *, rtol: float) -> None:
    """Raises a `Disagreement` unless every loss is the other's on average over some steps, at least two a side.

    Each side samples anchors and proposals at random: averages may differ by four standard errors, and by `rtol`.
    """
    if ours[0].keys() != theirs[0].keys():
        raise Disagreement(f"ours has losses {sorted(ours[0])}, torchvision {sorted(theirs[0])}")
    for name in theirs[0]:
        a, b = (np.array([float(step[name]) for step in side]) for side in (ours, theirs))
        error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        if not abs(a.mean() - b.mean()) <= 4 * error + rtol * abs(b.mean()):
            raise Disagreement(
                f"{name}: {a.mean():.4f} on average, torchvision's {b.mean():.4f}, of standard error {error:.4f}"
            )


def _valid(arrays: Arrays, image: int) -> dict[str, np.ndarray]:
    rows = arrays["valid"][image]
    return {name: array[image][rows] for name, array in arrays.items() if name != "valid"}


def _order(a: Arrays, b: Arrays) -> list[int]:
    """Which of `b` is each of `a`: two whose scores differ by rounding may have changed places."""
    free, order = set(range(len(b["scores"]))), []
    for box, label in zip(a["boxes"], a["labels"], strict=True):
        distances = np.abs(b["boxes"] - box).max(axis=1) + 1e6 * (b["labels"] != label)
        order.append(min(free, key=lambda row: distances[row]))
        free.remove(order[-1])
    return order


def _mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.bitwise_count(a | b).sum()
    return float(np.bitwise_count(a & b).sum() / union) if union else 1.0
