"""The cost in AP of each kind of error, as defined by TIDE (Bolya et al. 2020, arXiv:2008.08115)."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from ._coco_eval import mean_defined
from ._prepare import Prepared, Truth, prepare


# The paper's main error types (section 2.2). Missed errors are objects, all others are false detections.
ERROR_KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
# Verdicts on detections that are not errors. Verdicts on errors are positions in `ERROR_KINDS`.
RIGHT, IGNORED = -1, -2
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)


@dataclass(frozen=True)
class JudgedDetections:
    """The `n` detections that count, ordered by class and then by image.

    - `results`: position of each in the results. `image_ids`, `labels` (positions in the categories), `scores`.
    - `verdicts`: position in `ERROR_KINDS`, or `RIGHT`, or `IGNORED` for a detection on a crowd.
    - `objects`: row of the object that was found or that the error is about; -1 if there is none.
    - `ious`: IoU with that object, or the largest IoU with any object if there is none.
    - `rivals`: row of the object of another class with the largest IoU, or -1 if that is below the foreground IoU.
    """

    results: Int64[np.ndarray, " n"]
    image_ids: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    scores: Float64[np.ndarray, " n"]
    verdicts: Int64[np.ndarray, " n"]
    objects: Int64[np.ndarray, " n"]
    ious: Float64[np.ndarray, " n"]
    rivals: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class JudgedObjects:
    """The `m` objects of the ground truth, without crowds.

    - `annotation_ids`, `image_ids`, `labels` (positions in the categories).
    - `found`: matched by a correct detection. `missed`: not found, and no classification or localization error is about
      it.
    """

    annotation_ids: Int64[np.ndarray, " m"]
    image_ids: Int64[np.ndarray, " m"]
    labels: Int64[np.ndarray, " m"]
    found: Bool[np.ndarray, " m"]
    missed: Bool[np.ndarray, " m"]


@dataclass(frozen=True)
class ErrorAnalysis:
    """The output of `analyze_errors`, for `k` categories in the order of their ids.

    - `ap`: AP at the foreground IoU (AP50 by default), exactly as computed by pycocotools. -1 without ground truth.
    - `costs`: the AP lost to each kind of error, i.e. the gain in AP if only that kind were corrected.
    - `false_positive_cost`, `false_negative_cost`: the same for all false detections, and for all objects not found.
    - `class_ap`: AP of each class, -1 without objects. `class_costs`: costs by class and kind, 0 without objects.
    - `precision`: for each class and each `recall` (0, .01, … 1), the best precision at that recall or a higher one; -1
      without objects.
    - `foreground_iou`, `background_iou`: the thresholds used.
    """

    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    ap: float
    costs: dict[str, float]
    false_positive_cost: float
    false_negative_cost: float
    class_ap: Float64[np.ndarray, " k"]
    class_costs: Float64[np.ndarray, "k e"]
    precision: Float64[np.ndarray, "k r"]
    recall: Float64[np.ndarray, " r"]
    detections: JudgedDetections
    objects: JudgedObjects
    foreground_iou: float
    background_iou: float


def analyze_errors(
    annotations: Truth,
    results: Sequence[Any],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    foreground_iou: float = 0.5,
    background_iou: float = 0.1,
    image_ids: Sequence[int] | None = None,
    max_detections: int = 100,
) -> ErrorAnalysis:
    """Classifies all false detections and missed objects by kind of error, and computes the cost of each kind in AP.

    Detections are matched to objects by pycocotools at `foreground_iou`, as for AP50. An unmatched detection is of the
    first kind that applies:

    - localization: its largest IoU with an object of its class is at least `background_iou` and below `foreground_iou`;
    - classification: its largest IoU with an object of another class is at least `foreground_iou`;
    - duplicate: its IoU with an object of its class, found by a better detection, is at least `foreground_iou`;
    - background: its IoU with every object is below `background_iou`;
    - both: otherwise, i.e. its largest IoU is with an object of another class and between the thresholds.

    An object is missed if it is not found and no classification or localization error is about it. The errors of a kind
    are corrected as in section 2.3. For classification or localization, the best error about each object that was not
    found becomes correct, and the others are removed. Both, duplicate and background errors are removed. Missed objects
    no longer count. A class left without objects has AP 1, or 0 if it has false detections left. The costs do not add
    up to 1 - AP, for reasons given in the paper.

    Other arguments, guarded cases and errors are as in `evaluate_coco`. In addition, a `ValueError` is raised unless
    0 < `background_iou` < `foreground_iou` <= 1.

    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> called_dog = [{"image_id": 1, "category_id": 8, "bbox": [10, 10, 50, 50], "score": 0.9}]
    >>> analysis = analyze_errors(annotations, called_dog)
    >>> analysis.ap, {kind: round(cost, 3) for kind, cost in analysis.costs.items() if cost}
    (0.0, {'classification': 1.0})
    """
    if not 0 < background_iou < foreground_iou <= 1:
        got = f"background_iou={background_iou} and foreground_iou={foreground_iou}"
        raise ValueError(f"background_iou must be above 0 and below foreground_iou, and that at most 1, got {got}.")
    if max_detections < 1:
        raise ValueError(f"max_detections must be positive, got {max_detections}.")
    prepared = prepare(annotations, results, iou_type=iou_type, image_ids=image_ids)
    evaluation, categories = prepared.evaluation, prepared.dataset.categories
    params = evaluation.params
    params.iouThrs, params.maxDets = np.array([foreground_iou]), [max_detections]
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    detections, objects = _judge(prepared, foreground_iou, background_iou)
    recall = np.asarray(params.recThrs, np.float64)
    base, corrected, no_false, none_missed = _precisions(detections, objects, recall, num_classes=len(categories))
    ap = mean_defined(base.T)  # transposed, so that values are summed in the same order as in pycocotools
    class_ap = base.mean(axis=1)
    return ErrorAnalysis(
        category_ids=tuple(category.id for category in categories),
        class_names=tuple(category.name for category in categories),
        ap=ap,
        costs={name: mean_defined(after.T) - ap for name, after in zip(ERROR_KINDS, corrected, strict=True)},
        false_positive_cost=mean_defined(no_false.T) - ap,
        false_negative_cost=mean_defined(none_missed.T) - ap,
        class_ap=class_ap,
        class_costs=np.stack([after.mean(axis=1) - class_ap for after in corrected], axis=1),
        precision=base,
        recall=recall,
        detections=detections,
        objects=objects,
        foreground_iou=foreground_iou,
        background_iou=background_iou,
    )


def _precisions(
    detections: Any, objects: Any, recall: Float64[np.ndarray, " r"], *, num_classes: int
) -> tuple[Any, list[Any], Any, Any]:
    """Returns precision at each recall of each class, `(k, r)`, four times: for the detections as they are, with each
    kind of error corrected, without false detections, and without missed objects."""
    counts = np.bincount(objects.labels, minlength=num_classes)
    as_found = _Outcome(detections.labels, detections.verdicts == RIGHT, detections.verdicts == IGNORED, counts)

    def precision_of(outcome: _Outcome) -> Float64[np.ndarray, "k r"]:
        return _precision(outcome, detections.scores, recall, counted=counts > 0)

    corrected = [precision_of(_corrected(kind, as_found, detections, objects)) for kind in range(len(ERROR_KINDS))]
    no_false = precision_of(as_found._replace(ignored=as_found.ignored | (detections.verdicts >= 0)))
    found_counts = np.bincount(objects.labels[objects.found], minlength=num_classes)
    none_missed = precision_of(as_found._replace(counts=found_counts))
    return precision_of(as_found), corrected, no_false, none_missed


class _Outcome(NamedTuple):
    """What AP depends on: the label of each detection, whether it is right or ignored, and the objects per class."""

    labels: Int64[np.ndarray, " n"]
    right: Bool[np.ndarray, " n"]
    ignored: Bool[np.ndarray, " n"]
    counts: Int64[np.ndarray, " k"]


def _corrected(kind: int, outcome: _Outcome, detections: JudgedDetections, objects: JudgedObjects) -> _Outcome:
    """Returns the outcome with the errors of one kind corrected."""
    if ERROR_KINDS[kind] == "missed":
        missed = np.bincount(objects.labels[objects.missed], minlength=len(outcome.counts))
        return outcome._replace(counts=outcome.counts - missed)
    rows = np.flatnonzero(detections.verdicts == kind)
    labels, right, ignored = outcome.labels.copy(), outcome.right.copy(), outcome.ignored.copy()
    ignored[rows] = True
    if kind in (_CLASSIFICATION, _LOCALIZATION):
        rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
        rows = rows[~objects.found[detections.objects[rows]]]
        _, first = np.unique(detections.objects[rows], return_index=True)
        best = rows[first]
        labels[best] = objects.labels[detections.objects[best]]
        right[best], ignored[best] = True, False
    return outcome._replace(labels=labels, right=right, ignored=ignored)


def _precision(
    outcome: _Outcome, scores: Float64[np.ndarray, " n"], recall: Float64[np.ndarray, " r"], *, counted: np.ndarray
) -> Float64[np.ndarray, "k r"]:
    """Returns precision of each class at each recall, bit for bit as pycocotools' `accumulate`; -1 if not `counted`."""
    precision = np.full((len(outcome.counts), len(recall)), -1.0)
    by_class = np.argsort(outcome.labels, kind="stable")
    bounds = np.searchsorted(outcome.labels[by_class], np.arange(len(outcome.counts) + 1))
    for k in np.flatnonzero(counted):
        rows = by_class[bounds[k] : bounds[k + 1]]
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        rows = rows[~outcome.ignored[rows]]
        if not outcome.counts[k]:
            precision[k] = float(len(rows) == 0)
            continue
        right = np.cumsum(outcome.right[rows]).astype(np.float64)
        wrong = np.cumsum(~outcome.right[rows]).astype(np.float64)
        share = right / (wrong + right + np.spacing(1))
        share = np.maximum.accumulate(share[::-1])[::-1]  # the maximum at this rank or a later one
        at = np.searchsorted(right / outcome.counts[k], recall, side="left")
        precision[k] = np.append(share, 0.0)[at]
    return precision


def _judge(prepared: Prepared, foreground_iou: float, background_iou: float) -> tuple[JudgedDetections, JudgedObjects]:
    """Returns all detections and objects as flat tables, in pycocotools' order, with a verdict on each."""
    detected, truth = [], []
    row_of = {0: -1}  # row in `truth` of each annotation; pycocotools uses id 0 for no match
    for entry in filter(None, prepared.evaluation.evalImgs):
        image, label = entry["image_id"] - 1, entry["category_id"] - 1
        for annotation, match, ignored in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True):
            row_of[annotation] = -1 if ignored else len(truth)
            if not ignored:
                truth.append((annotation - 1, image, label, match > 0))
        for result, match, ignored, score in zip(
            entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], entry["dtScores"], strict=True
        ):
            verdict = IGNORED if ignored else RIGHT if match > 0 else _BACKGROUND
            detected.append((result - 1, image, label, verdict, row_of[int(match)], score))
    annotations, object_images, object_labels, is_found = (
        np.array(column, np.int64) for column in (zip(*truth, strict=True) if truth else [()] * 4)
    )
    *columns, scores = zip(*detected, strict=True) if detected else [()] * 6
    rows, images, detected_labels, verdicts, owners = (np.array(column, np.int64) for column in columns)
    ious, rivals = np.zeros(len(detected)), np.full(len(detected), -1)
    pointed_at = np.zeros(len(truth), bool)
    for d, o in _by_image(images, object_images):
        overlap = _overlaps(prepared.evaluation, rows[d], annotations[o])  # (d, o)
        same = detected_labels[d][:, None] == object_labels[o][None]  # (d, o)
        own, other = np.where(same, overlap, 0.0), np.where(same, 0.0, overlap)
        best_own, best_other, any_iou = own.max(axis=1), other.max(axis=1), overlap.max(axis=1)
        own_row, other_row = o[own.argmax(axis=1)], o[other.argmax(axis=1)]
        rivals[d] = np.where(best_other >= foreground_iou, other_row, -1)
        kinds = np.select(
            [
                (best_own >= background_iou) & (best_own < foreground_iou),
                best_other >= foreground_iou,
                best_own >= foreground_iou,
                any_iou < background_iou,
            ],
            [_LOCALIZATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND],
            _BOTH,
        )
        wrong = verdicts[d] == _BACKGROUND  # not judged yet
        about_own = (kinds == _LOCALIZATION) | (kinds == _DUPLICATE)
        about = np.where(about_own, own_row, np.where(kinds == _BACKGROUND, -1, other_row))
        verdicts[d] = np.where(wrong, kinds, verdicts[d])
        owners[d] = np.where(wrong, about, owners[d])
        position = np.searchsorted(o, owners[d].clip(0)).clip(0, len(o) - 1)
        ious[d] = np.where(owners[d] >= 0, overlap[np.arange(len(d)), position], any_iou)
        points = wrong & ((kinds == _LOCALIZATION) | (kinds == _CLASSIFICATION))
        pointed_at[about[points]] = True
    found_flags = is_found.astype(bool)
    return (
        JudgedDetections(
            rows,
            prepared.image_ids[images],
            detected_labels,
            np.array(scores, np.float64),
            verdicts,
            owners,
            ious,
            rivals,
        ),
        JudgedObjects(
            prepared.annotation_ids[annotations],
            prepared.image_ids[object_images],
            object_labels,
            found_flags,
            ~found_flags & ~pointed_at,
        ),
    )


def _by_image(
    of_detections: Int64[np.ndarray, " n"], of_objects: Int64[np.ndarray, " m"]
) -> Iterator[tuple[Int64[np.ndarray, " d"], Int64[np.ndarray, " o"]]]:
    """Yields the rows of the detections and of the objects for each image that has both, in ascending order."""
    by_detection, by_object = np.argsort(of_detections, kind="stable"), np.argsort(of_objects, kind="stable")
    images = np.intersect1d(of_detections, of_objects)
    groups = []
    for order, values in ((by_detection, of_detections[by_detection]), (by_object, of_objects[by_object])):
        starts, ends = np.searchsorted(values, images), np.searchsorted(values, images, side="right")
        groups.append([order[start:end] for start, end in zip(starts, ends, strict=True)])
    yield from zip(*groups, strict=True)


def _overlaps(
    evaluation: COCOeval, results: Int64[np.ndarray, " d"], annotations: Int64[np.ndarray, " o"]
) -> Float64[np.ndarray, "d o"]:
    """Returns the IoU of each detection with each object of an image."""
    key = "bbox" if evaluation.params.iouType == "bbox" else "segmentation"
    detected: Any = [evaluation.cocoDt.anns[int(row) + 1][key] for row in results]
    objects: Any = [evaluation.cocoGt.anns[int(row) + 1][key] for row in annotations]
    return np.asarray(rle.iou(detected, objects, [0] * len(objects)), np.float64)
