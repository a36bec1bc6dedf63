"""Views of an error analysis: confusion matrix, calibration, rows for data frames, and a text table."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from ._errors import ERROR_KINDS, IGNORED, RIGHT, ErrorAnalysis


@dataclass(frozen=True)
class Calibration:
    """The calibration of scores, in `b` bins of equal width over 0..1.

    - `scores`, `precision`: mean score and fraction of correct detections in each bin, 0 in empty bins.
    - `counts`: number of detections in each bin.
    - `error`: the expected calibration error, i.e. |precision - score| of the bins, averaged over detections.
    """

    scores: Float64[np.ndarray, " b"]
    precision: Float64[np.ndarray, " b"]
    counts: Int64[np.ndarray, " b"]
    error: float


def confusion_matrix(analysis: ErrorAnalysis, *, score_threshold: float = 0.5) -> Int64[np.ndarray, "k1 k1"]:
    """Counts how often objects of one class (row) are detected as another (column), with at least the score threshold.

    The last column counts objects without a detection, the last row detections without an object: background and
    duplicates. Correct detections lie on the diagonal. Each of the others, best first, claims the object of another
    class with the largest IoU, if that reaches the foreground IoU and the object is not yet found or claimed.
    Detections on crowds are left out.

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
    detections, objects = analysis.detections, analysis.objects
    background = len(analysis.class_names)
    counts = np.zeros((background + 1, background + 1), np.int64)
    confident = detections.scores >= score_threshold
    claimed = np.zeros(len(objects.labels), bool)
    right = confident & (detections.verdicts == RIGHT)
    claimed[detections.objects[right]] = True
    counts += np.diag(np.bincount(detections.labels[right], minlength=background + 1))
    wrong = np.flatnonzero(confident & (detections.verdicts >= 0))
    for row in wrong[np.argsort(-detections.scores[wrong], kind="stable")]:
        rival = detections.rivals[row]
        if rival >= 0 and not claimed[rival]:
            claimed[rival] = True
            counts[objects.labels[rival], detections.labels[row]] += 1
        else:
            counts[background, detections.labels[row]] += 1
    counts[:, background] += np.bincount(objects.labels[~claimed], minlength=background + 1)
    return counts


def calibration(analysis: ErrorAnalysis, *, num_bins: int = 10) -> Calibration:
    """Measures how well scores predict the probability that a detection is correct, i.e. matched at the foreground IoU.

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
    """Returns one row for each detection and each missed object, for example for `pandas.DataFrame`.

    The fields are `image_id`, `category` (a name), `verdict` (`"right"`, `"ignored"` or a kind of error), `score`,
    `iou`, `object` (category name of the object that was found or that the error is about), `result` (position in the
    results) and `annotation` (annotation id of the object). Fields that do not apply are `None`.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> [row["verdict"] for row in error_rows(analyze_errors(annotations, []))]
    ['missed']
    """
    names, detections, objects = analysis.class_names, analysis.detections, analysis.objects
    verdicts = {RIGHT: "right", IGNORED: "ignored"} | dict(enumerate(ERROR_KINDS))
    rows: list[dict[str, Any]] = []
    for i in range(len(detections.results)):
        at = int(detections.objects[i])
        rows.append(
            {
                "image_id": int(detections.image_ids[i]),
                "category": names[detections.labels[i]],
                "verdict": verdicts[int(detections.verdicts[i])],
                "score": float(detections.scores[i]),
                "iou": float(detections.ious[i]),
                "object": names[objects.labels[at]] if at >= 0 else None,
                "result": int(detections.results[i]),
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
    """Returns one row per class: `category`, `objects`, `detections`, `ap`, and the cost of each kind of error in AP.

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
    """Formats number and cost, in points of AP, of each kind of error as a table. Without objects, costs are dashes.

    >>> from detectax_eqx.evaluate import analyze_errors
    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> print(format_errors(analyze_errors(annotations, [])))  # doctest: +ELLIPSIS
    AP at IoU 0.50: 0.0
    error            count  cost in AP
    classification       0         0.0
    ...
    missed               1       100.0
    false positives      0         0.0
    false negatives      1       100.0
    """
    verdicts = analysis.detections.verdicts
    points = (lambda value: f"{100 * value:.1f}") if analysis.ap >= 0 else lambda _: "–"
    lines = [
        f"AP at IoU {analysis.foreground_iou:.2f}: {points(analysis.ap)}",
        f"{'error':<15} {'count':>6}  {'cost in AP':>10}",
    ]
    rows = [(name, int((verdicts == kind).sum()), analysis.costs[name]) for kind, name in enumerate(ERROR_KINDS[:-1])]
    rows += [
        ("missed", int(analysis.objects.missed.sum()), analysis.costs["missed"]),
        ("false positives", int((verdicts >= 0).sum()), analysis.false_positive_cost),
        ("false negatives", int((~analysis.objects.found).sum()), analysis.false_negative_cost),
    ]
    lines += [f"{name:<15} {count:>6}  {points(cost):>10}" for name, count, cost in rows]
    return "\n".join(lines)
