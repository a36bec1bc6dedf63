"""Detections of two runtimes in one image, matched and compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


# How far a runtime may be from JAX: pixels, scores, and probabilities of mask pixels.
BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 0.05, 1e-4, 1e-2
# From this IoU on, two detections of a label are one that both sides found; what they differ by is then compared.
MATCH_IOU = 0.5
# So close to the threshold of suppression, rounding decides whether an overlap suppresses.
IOU_TOLERANCE = 1e-4
# Up to this score, a detection that only one side has may come from a proposal that rounding moved over a threshold.
UNMATCHED_SCORE = 0.1


class ExportError(ValueError):
    """What was exported does not give what the model gives; the message names the output."""


def compare_detections(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    where: str,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    unmatched_score: float = UNMATCHED_SCORE,
) -> tuple[int, int]:
    """Compares an exported file's detections in one image with the model's. Returns how many match, and do not.

    Matched ones, see `match_detections`, must agree within .05 pixels, 1e-4 in score and .01 in mask probability. One
    side may have a detection that the other lacks where rounding decides: if its score is at most `unmatched_score`, or
    exceeds by at most 1e-4 the `score_threshold` or, where the other side is full, the lowest of its `max_detections`;
    or if its IoU with a better detection of the other side, of its label, is within 1e-4 of `nms_threshold`.

    - `found`, `expected`: the file's and the model's `boxes`, `scores`, `labels`, and `masks` if there are any, valid
      rows alone. `where`: what messages call the image.

    Raises an `ExportError` that names the image, and the score and box of what differs.

    >>> one = {"boxes": np.array([[0.0, 0.0, 10.0, 10.0]]), "scores": np.array([0.9]), "labels": np.array([1])}
    >>> compare_detections(one, one, where="street.jpg")
    (1, 0)
    """
    rows, other_rows = match_detections(found, expected)
    sides = ((expected, other_rows, found, "the file lacks"), (found, rows, expected, "the model does not make"))
    unmatched = 0
    for one, taken, other, what in sides:
        limit = max(unmatched_score, score_threshold + SCORE_TOLERANCE)
        if len(other["scores"]) >= max_detections:
            limit = max(limit, float(np.min(other["scores"])) + SCORE_TOLERANCE)
        for row in np.setdiff1d(np.arange(len(one["scores"])), taken).tolist():
            unmatched += 1
            excused = one["scores"][row] <= limit or _at_threshold(one, row, other, nms_threshold)
            if not excused:  # also where the score is NaN
                raise ExportError(
                    f"valid differs on {where}: {what} the detection {describe(one, row)}. Rounding excuses scores of "
                    f"up to {limit:.4g}. If you can do without this one, set unmatched_score (--unmatched-score of "
                    "export.py) or the score threshold above it."
                )
    tolerances = {"boxes": BOX_TOLERANCE, "scores": SCORE_TOLERANCE, "masks": MASK_TOLERANCE}
    for name, tolerance in tolerances.items():
        if name not in expected or not rows:
            continue
        difference = np.abs(np.asarray(found[name])[rows] - np.asarray(expected[name])[other_rows])
        worst = difference.reshape(len(rows), -1).max(axis=1)
        if not worst.max() <= tolerance:  # also where it is NaN
            row = other_rows[int(np.nan_to_num(worst, nan=np.inf).argmax())]
            raise ExportError(
                f"{name} differ on {where} by {worst.max():.2g}, more than {tolerance:g}, in the model's detection "
                f"{describe(expected, row)}."
            )
    return len(rows), unmatched


def check_counts(matched: int, unmatched: int, *, images: int) -> None:
    """Refuses a file that has little in common with the model, though no image's comparison did: all scores are low.

    Raises an `ExportError` if more detections are one side's alone than are of both, and than there are `images`.
    """
    if unmatched > max(matched, images):
        raise ExportError(
            f"valid differs: of the detections in {images} images, {matched} are the model's and the file's, and "
            f"{unmatched} of one alone. All of these have low scores: compare on images that show objects."
        )


def match_detections(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Rows of `found` and of `expected` that are the same object: equal labels, and an IoU of at least .5 or boxes
    within .05 pixels.

    The closest boxes are matched first, of equally close ones those of the closest scores.

    >>> boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    >>> one = {"boxes": boxes, "scores": np.array([0.9, 0.8]), "labels": np.array([1, 2])}
    >>> other = {"boxes": boxes[::-1], "scores": np.array([0.8, 0.7]), "labels": np.array([2, 0])}
    >>> match_detections(one, other)
    ([1], [0])
    """
    boxes, other_boxes = (np.asarray(side["boxes"], np.float32).reshape(-1, 4) for side in (found, expected))
    distance = np.abs(boxes[:, None] - other_boxes[None]).max(axis=2)  # (n, m): pixels between corners
    score_distance = np.abs(np.asarray(found["scores"])[:, None] - np.asarray(expected["scores"])[None])
    rows: list[int] = []
    other_rows: list[int] = []
    possible = _possible(found, expected, boxes, other_boxes)
    free, other_free = np.ones(len(boxes), bool), np.ones(len(other_boxes), bool)
    for flat in np.lexsort((score_distance.ravel(), distance.ravel())).tolist():
        row, other_row = divmod(flat, len(other_boxes))
        if possible[row, other_row] and free[row] and other_free[other_row]:
            free[row] = other_free[other_row] = False
            rows.append(row)
            other_rows.append(other_row)
    return rows, other_rows


def _possible(found: Mapping[str, Any], expected: Mapping[str, Any], boxes: Any, other: Any) -> Bool[np.ndarray, "n m"]:
    """Which rows may be matched. Boxes within the tolerance may: one without area has no IoU."""
    same_label = np.asarray(found["labels"])[:, None] == np.asarray(expected["labels"])[None]
    close = (np.abs(boxes[:, None] - other[None]) <= BOX_TOLERANCE).all(axis=2)
    return same_label & ((_iou(boxes, other) >= MATCH_IOU) | close)


def _at_threshold(one: Mapping[str, Any], row: int, other: Mapping[str, Any], nms_threshold: float) -> bool:
    """Whether a better detection of the other side overlaps this one by the threshold itself, but for rounding."""
    boxes, other_boxes = (np.asarray(side["boxes"], np.float32).reshape(-1, 4) for side in (one, other))
    better = np.asarray(other["scores"]) >= one["scores"][row] - SCORE_TOLERANCE
    rivals = better & (np.asarray(other["labels"]) == one["labels"][row])
    overlaps = _iou(boxes[row : row + 1], other_boxes)[0]
    return bool((rivals & (np.abs(overlaps - nms_threshold) <= IOU_TOLERANCE)).any())


def _iou(boxes: np.ndarray, other: np.ndarray) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every pair, 0 where there is no area."""
    low, high = np.maximum(boxes[:, None, :2], other[None, :, :2]), np.minimum(boxes[:, None, 2:], other[None, :, 2:])
    intersection = np.maximum(high - low, 0).prod(axis=2)
    areas, other_areas = ((side[:, 2:] - side[:, :2]).prod(axis=1) for side in (boxes, other))
    union = areas[:, None] + other_areas[None] - intersection
    return np.where(union > 0, intersection / np.where(union > 0, union, 1), 0)


def describe(detections: Mapping[str, Any], row: int) -> str:
    """One detection in words."""
    x0, y0, x1, y1 = np.asarray(detections["boxes"])[row].tolist()
    label, score = int(detections["labels"][row]), float(detections["scores"][row])
    return f"of label {label}, score {score:.4g}, box ({x0:.1f}, {y0:.1f}, {x1:.1f}, {y1:.1f})"


def valid_rows(outputs: Mapping[str, Any], image: int) -> dict[str, np.ndarray]:
    """The valid rows of one image of a batch of detections."""
    valid = np.asarray(outputs["valid"][image])
    return {name: np.asarray(array[image])[valid] for name, array in outputs.items() if name != "valid"}


def name_of(names: Sequence[str], position: int, count: int) -> str:
    """What messages call an image: its own name if it has one."""
    if position >= count:
        return "a black image"
    return names[position] if names else f"image {position}"
