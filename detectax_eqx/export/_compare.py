"""Matches and compares the detections of two runtimes in one image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float


@dataclass(frozen=True)
class Tolerances:
    """Largest differences allowed between a file and the model.

    - `boxes`: in pixels. `scores`. `masks`: in the probabilities of their pixels.
    - `iou`: an IoU this close to the NMS threshold may fall on either side of it through rounding.
    - `exceptions`: the share of the detections in an image, rounded up, that may differ by more or be unmatched.
    """

    boxes: float = 0.05
    scores: float = 1e-4
    masks: float = 1e-2
    iou: float = 1e-4
    exceptions: float = 0.0


# Of files that compute in single precision, and in half precision, whose rounding errors are 8,192 times as large: they
# may refine another one of several proposals of an object, so that boxes and masks only have to match and be finite. In
# a detection transformer, two proposals of nearly equal scores may change places, and with them the queries they meet:
# of 1,435 detections of one that was trained, scores of 6 moved by .05 to .16, and its AP by .0007.
SINGLE = Tolerances()
HALF = Tolerances(boxes=math.inf, scores=0.05, masks=1.0, iou=0.02, exceptions=0.1)
# Two detections with the same label and at least this IoU match; their differences are then compared.
MATCH_IOU = 0.5
# Up to this score, a detection without a match may come from a proposal that rounding moved across a threshold.
UNMATCHED_SCORE = 0.1


class ExportError(ValueError):
    """The outputs of an exported file differ from those of the model. The message names the output that differs."""


def compare_detections(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    where: str,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    unmatched_score: float = UNMATCHED_SCORE,
    tolerances: Tolerances = SINGLE,
) -> tuple[int, int]:
    """Compares an exported file's detections in one image with the model's.

    Returns the number of matched pairs and the number of unmatched detections. Matched pairs, see `match_detections`,
    must agree within the `tolerances`, whose `exceptions` are not among the matched. A detection may be unmatched if
    rounding can explain it, that is, if

    - its score is at most `unmatched_score`;
    - its score is at most a tolerance above `score_threshold`, or above the lowest score of the other side if that
      side already has `max_detections`;
    - or its IoU with a detection of the other side that has its label and at least its score is within a tolerance of
      `nms_threshold`.

    - `found`, `expected`: `boxes`, `scores`, `labels` and, if there are any, `masks` of the file and of the model.
      Valid rows only.
    - `where`: the name of the image in messages.

    Raises an `ExportError` that names the image and gives the score and box of the detection that differs.

    >>> one = {"boxes": np.array([[0.0, 0.0, 10.0, 10.0]]), "scores": np.array([0.9]), "labels": np.array([1])}
    >>> compare_detections(one, one, where="street.jpg")
    (1, 0)
    """
    rows, other_rows = match_detections(found, expected)
    sides = ((expected, other_rows, found, "the file lacks"), (found, rows, expected, "the model does not make"))
    unmatched, allowed = 0, math.ceil(tolerances.exceptions * len(expected["scores"]))
    for detections, matched_rows, other, problem in sides:
        limit = max(unmatched_score, score_threshold + tolerances.scores)
        if len(other["scores"]) >= max_detections:
            limit = max(limit, float(np.min(other["scores"])) + tolerances.scores)
        for row in np.setdiff1d(np.arange(len(detections["scores"])), matched_rows).tolist():
            unmatched += 1
            excused = detections["scores"][row] <= limit or _at_threshold(
                detections, row, other, nms_threshold, tolerances
            )
            allowed -= not excused
            if not excused and (allowed < 0 or np.isnan(detections["scores"][row])):
                raise ExportError(
                    f"valid differs on {where}: {problem} the detection {describe(detections, row)}. Rounding can "
                    f"explain this only for scores up to {limit:.4g}. To accept this detection, set unmatched_score "
                    "(--unmatched-score of export.py) or the score threshold above its score."
                )
    far = np.zeros(len(rows), bool)
    for name, tolerance in vars(tolerances).items():
        if name not in expected or not rows:
            continue
        difference = np.abs(np.asarray(found[name])[rows] - np.asarray(expected[name])[other_rows])
        worst = difference.reshape(len(rows), -1).max(axis=1)
        far |= ~(worst <= tolerance)  # also true for NaN
        if far.sum() > allowed or np.isnan(worst).any():
            row = other_rows[int(np.nan_to_num(worst, nan=np.inf).argmax())]
            raise ExportError(
                f"{name} differ on {where} by {worst.max():.2g}, more than {tolerance:g}, in the model's detection "
                f"{describe(expected, row)}."
            )
    return len(rows) - int(far.sum()), unmatched + int(far.sum())


def check_counts(matched: int, unmatched: int, *, images: int) -> None:
    """Rejects a file that shares few detections with the model, even if every image passed `compare_detections`.

    This happens if all scores are low. Raises an `ExportError` if the unmatched detections outnumber both the matched
    ones and the `images`.
    """
    if unmatched > max(matched, images):
        raise ExportError(
            f"valid differs: of the detections in {images} images, {matched} match and {unmatched} appear on one side "
            "only, all of them with low scores. Compare on images that show objects."
        )


def match_detections(found: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Matches the detections of two sides. Returns the rows of `found` and of `expected` that form the pairs.

    Two detections can match if their labels are equal and either their IoU is at least .5 or their boxes are within
    .05 pixels. The closest boxes are matched first; ties are broken by the closest scores.

    >>> boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    >>> one = {"boxes": boxes, "scores": np.array([0.9, 0.8]), "labels": np.array([1, 2])}
    >>> other = {"boxes": boxes[::-1], "scores": np.array([0.8, 0.7]), "labels": np.array([2, 0])}
    >>> match_detections(one, other)
    ([1], [0])
    """
    boxes, other_boxes = (np.asarray(side["boxes"], np.float32).reshape(-1, 4) for side in (found, expected))
    distance = np.abs(boxes[:, None] - other_boxes[None]).max(axis=2)  # (n, m) largest coordinate difference in pixels
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
    """Which pairs can match. Boxes within the tolerance always can, since a box without area has no IoU."""
    same_label = np.asarray(found["labels"])[:, None] == np.asarray(expected["labels"])[None]
    close = (np.abs(boxes[:, None] - other[None]) <= SINGLE.boxes).all(axis=2)
    return same_label & ((_iou(boxes, other) >= MATCH_IOU) | close)


def _at_threshold(
    one: Mapping[str, Any], row: int, other: Mapping[str, Any], nms_threshold: float, tolerances: Tolerances
) -> bool:
    """Whether the IoU with a better detection of the same label equals the NMS threshold up to rounding."""
    boxes, other_boxes = (np.asarray(side["boxes"], np.float32).reshape(-1, 4) for side in (one, other))
    better = np.asarray(other["scores"]) >= one["scores"][row] - tolerances.scores
    rivals = better & (np.asarray(other["labels"]) == one["labels"][row])
    overlaps = _iou(boxes[row : row + 1], other_boxes)[0]
    return bool((rivals & (np.abs(overlaps - nms_threshold) <= tolerances.iou)).any())


def _iou(boxes: np.ndarray, other: np.ndarray) -> Float[np.ndarray, "n m"]:
    """Pairwise intersection over union, 0 where the union has no area."""
    low, high = np.maximum(boxes[:, None, :2], other[None, :, :2]), np.minimum(boxes[:, None, 2:], other[None, :, 2:])
    intersection = np.maximum(high - low, 0).prod(axis=2)  # (n, m)
    areas, other_areas = ((side[:, 2:] - side[:, :2]).prod(axis=1) for side in (boxes, other))
    union = areas[:, None] + other_areas[None] - intersection
    return np.where(union > 0, intersection / np.where(union > 0, union, 1), 0)


def describe(detections: Mapping[str, Any], row: int) -> str:
    """The label, score and box of one detection, as text."""
    x0, y0, x1, y1 = np.asarray(detections["boxes"])[row].tolist()
    label, score = int(detections["labels"][row]), float(detections["scores"][row])
    return f"of label {label}, score {score:.4g}, box ({x0:.1f}, {y0:.1f}, {x1:.1f}, {y1:.1f})"


def valid_rows(outputs: Mapping[str, Any], image: int) -> dict[str, np.ndarray]:
    """The valid rows of one image of a batch of detections."""
    valid = np.asarray(outputs["valid"][image])
    return {name: np.asarray(array[image])[valid] for name, array in outputs.items() if name != "valid"}


def name_of(names: Sequence[str], position: int, count: int) -> str:
    """The name of an image in messages: its own if `names` are given, otherwise its position."""
    if position >= count:
        return "a black image"
    return names[position] if names else f"image {position}"
