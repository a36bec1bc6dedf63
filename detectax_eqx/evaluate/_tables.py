"""Views of an error analysis: confusion matrix, calibration, tidy rows, a table to print."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from ._errors import ERROR_KINDS, IGNORED, RIGHT, ErrorAnalysis


@dataclass(frozen=True)
class Calibration:
    """How often detections of about the same score are right, in `b` bins of equal width over 0..1.

    - `scores`, `precision`: mean score and share of right detections in each bin, 0 in one without any. `counts`.
    - `error`: the expected calibration error, the mean over detections of their bin's |precision - score|.
    """

    scores: Float64[np.ndarray, " b"]
    precision: Float64[np.ndarray, " b"]
    counts: Int64[np.ndarray, " b"]
    error: float


def confusion_matrix(analysis: ErrorAnalysis, *, score_threshold: float = 0.5) -> Int64[np.ndarray, "k1 k1"]:
    """How often an object of one class (row) was found as another (column), among detections of at least that score.

    The last column counts objects that nothing was found for, the last row detections that found nothing: of
    background, and duplicates. What is right lies on the diagonal; of the others each, best first, claims the object of
    another class that it covers best, if by the foreground IoU and not yet found or claimed. Detections on crowds are
    left out.

    Raises a `ValueError` unless 0 <= `score_threshold` <= 1.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> called_dog = [{"image_id": 1, "category_id": 8, "bbox": [10, 10, 50, 50], "score": 0.9}]
    >>> confusion_matrix(analyze_errors(annotations, called_dog)).tolist()
    [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in 0..1, got {score_threshold}.")
    found, objects = analysis.detections, analysis.objects
    none = len(analysis.class_names)
    counts = np.zeros((none + 1, none + 1), np.int64)
    seen = found.scores >= score_threshold
    claimed = np.zeros(len(objects.labels), bool)
    right = seen & (found.verdicts == RIGHT)
    claimed[found.objects[right]] = True
    counts += np.diag(np.bincount(found.labels[right], minlength=none + 1))
    wrong = np.flatnonzero(seen & (found.verdicts >= 0))
    for row in wrong[np.argsort(-found.scores[wrong], kind="stable")]:
        rival = found.rivals[row]
        if rival >= 0 and not claimed[rival]:
            claimed[rival] = True
            counts[objects.labels[rival], found.labels[row]] += 1
        else:
            counts[none, found.labels[row]] += 1
    counts[:, none] += np.bincount(objects.labels[~claimed], minlength=none + 1)
    return counts


def calibration(analysis: ErrorAnalysis, *, num_bins: int = 10) -> Calibration:
    """How far scores can be read as the chance of being right, that is of being matched at the foreground IoU.

    Detections on crowds are left out. A score of 1 belongs to the last bin.

    Raises a `ValueError` unless `num_bins` is positive.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> found = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "score": 0.75}]
    >>> calibration(analyze_errors(annotations, found)).error
    0.25
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be positive, got {num_bins}.")
    counted = analysis.detections.verdicts != IGNORED
    scores, right = analysis.detections.scores[counted], analysis.detections.verdicts[counted] == RIGHT
    bins = np.floor(scores.clip(0, 1) * num_bins).astype(np.int64).clip(0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    mean_scores = np.bincount(bins, scores, num_bins) / counts.clip(1)
    precision = np.bincount(bins, right, num_bins) / counts.clip(1)
    error = float((counts * np.abs(precision - mean_scores)).sum() / max(1, counts.sum()))
    return Calibration(mean_scores, precision, counts, error)


def error_rows(analysis: ErrorAnalysis) -> list[dict[str, Any]]:
    """One row for each detection and each missed object, as `pandas.DataFrame` takes them.

    `image_id`, `category` (its name), `verdict` (`"right"`, `"ignored"` or a kind of error), `score`, `iou`, `object`
    (the category of the object found or that the error is about), `result` (its position in the results) and
    `annotation` (the id of the object's); `None` where there is none.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> [row["verdict"] for row in error_rows(analyze_errors(annotations, []))]
    ['missed']
    """
    names, found, objects = analysis.class_names, analysis.detections, analysis.objects
    verdicts = {RIGHT: "right", IGNORED: "ignored"} | dict(enumerate(ERROR_KINDS))
    rows: list[dict[str, Any]] = []
    for i in range(len(found.results)):
        at = int(found.objects[i])
        rows.append(
            {
                "image_id": int(found.image_ids[i]),
                "category": names[found.labels[i]],
                "verdict": verdicts[int(found.verdicts[i])],
                "score": float(found.scores[i]),
                "iou": float(found.ious[i]),
                "object": names[objects.labels[at]] if at >= 0 else None,
                "result": int(found.results[i]),
                "annotation": int(objects.annotation_ids[at]) if at >= 0 else None,
            }
        )
    for at in np.flatnonzero(objects.missed).tolist():
        name = names[objects.labels[at]]
        rows.append(
            {
                "image_id": int(objects.image_ids[at]),
                "category": name,
                "verdict": "missed",
                "score": None,
                "iou": None,
                "object": name,
                "result": None,
                "annotation": int(objects.annotation_ids[at]),
            }
        )
    return rows


def class_rows(analysis: ErrorAnalysis) -> list[dict[str, Any]]:
    """One row for each class: `category`, `objects`, `detections`, `ap`, and the cost of each kind of error in its AP.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> row = class_rows(analyze_errors(annotations, []))[0]
    >>> row["category"], row["objects"], row["ap"], row["missed"]
    ('cat', 1, 0.0, 1.0)
    """
    num_classes = len(analysis.class_names)
    counted = analysis.detections.verdicts != IGNORED
    objects = np.bincount(analysis.objects.labels, minlength=num_classes)
    detections = np.bincount(analysis.detections.labels[counted], minlength=num_classes)
    return [
        {
            "category": name,
            "objects": int(objects[k]),
            "detections": int(detections[k]),
            "ap": float(analysis.class_ap[k]),
            **dict(zip(ERROR_KINDS, analysis.class_costs[k].tolist(), strict=True)),
        }
        for k, name in enumerate(analysis.class_names)
    ]


def format_errors(analysis: ErrorAnalysis) -> str:
    """The cost and the number of each kind of error as a table, in points of AP; dashes if there are no objects.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> print(format_errors(analyze_errors(annotations, [])))  # doctest: +ELLIPSIS
    AP at IoU 0.50: 0.0
    error           count  cost in AP
    classification      0         0.0
    ...
    missed              1       100.0
    all false           0         0.0
    all not found       1       100.0
    """
    verdicts = analysis.detections.verdicts
    points = (lambda value: f"{100 * value:.1f}") if analysis.ap >= 0 else lambda _: "–"
    lines = [
        f"AP at IoU {analysis.foreground_iou:.2f}: {points(analysis.ap)}",
        f"{'error':<14} {'count':>6}  {'cost in AP':>10}",
    ]
    rows = [(name, int((verdicts == kind).sum()), analysis.costs[name]) for kind, name in enumerate(ERROR_KINDS[:-1])]
    rows += [
        ("missed", int(analysis.objects.missed.sum()), analysis.costs["missed"]),
        ("all false", int((verdicts >= 0).sum()), analysis.false_positive_cost),
        ("all not found", int((~analysis.objects.found).sum()), analysis.false_negative_cost),
    ]
    lines += [f"{name:<14} {count:>6}  {points(cost):>10}" for name, count, cost in rows]
    return "\n".join(lines)
