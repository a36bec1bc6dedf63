"""COCO evaluation with pycocotools, guarded against its pitfalls."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from pycocotools.cocoeval import COCOeval

from ._checks import IoUType
from ._prepare import Truth, prepare


# COCO's tolerance of each of the 17 points of a person, relative to the square root of the object's area, in the order
# nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles. OKS is exp(-d² / (2 area (2 sigma)²)), averaged over
# the labelled points, where d is the distance of a point in pixels (cocodataset.org, "Keypoint Evaluation").
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
# The tolerance of points other than COCO's: between those of elbows and of ears.
UNIFORM_SIGMA = 0.05
# The default number of detections that count per category and image. For keypoints, COCO counts 20.
MAX_DETECTIONS = {"bbox": 100, "segm": 100, "keypoints": 20}


@dataclass(frozen=True)
class ClassMetrics:
    """AP of one category.

    - `ap`: over IoU .50:.95. `ap50`: at IoU .50. `aps`, `apm`, `apl`: `ap` for small, medium and large objects. For
      keypoints, OKS takes the place of IoU.

    Each is -1 if the ground truth has no such object. For keypoints, `aps` is -1.
    """

    category_id: int
    name: str
    ap: float
    ap50: float
    aps: float = -1.0
    apm: float = -1.0
    apl: float = -1.0


@dataclass(frozen=True)
class CocoMetrics:
    """The output of `evaluate_coco`. `dataclasses.asdict` converts it to values that JSON can hold.

    - `numbers`: COCO's twelve metrics, 0..1, in the usual order: `AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl`.
      A metric without ground truth (for example without large objects) is -1, as in pycocotools. The number in `AR100`
      is `max_detections`. For keypoints there are ten: `AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl`.
    - `per_class`: in the order of the category ids.
    - `iou_type`: `"bbox"`, `"segm"` or `"keypoints"`. `max_detections`: the number of best detections that count, per
      category and image.
    """

    numbers: dict[str, float]
    per_class: tuple[ClassMetrics, ...]
    iou_type: IoUType
    max_detections: int


def evaluate_coco(
    annotations: Truth,
    results: Sequence[Any],
    *,
    iou_type: IoUType = "bbox",
    image_ids: Sequence[int] | None = None,
    max_detections: int | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
) -> CocoMetrics:
    """Computes COCO's metrics and the AP of every category with pycocotools: twelve, or ten for keypoints.

    - `annotations`: a dataset from `data.load_coco`, or the path, URL or content of a COCO JSON file, which is read by
      `data.load_annotations` with the same repairs and errors.
    - `results`: detections in COCO's results format (`to_coco_results`), in pixels of the original images. Each needs a
      `bbox` for boxes, a `segmentation` for masks, in any of COCO's formats, or `keypoints` with x, y and score of each
      point. The list may be empty.
    - `image_ids`: evaluate only these images and ignore results on others. Default: all.
    - `max_detections`: how many of the best detections count per category and image, by default COCO's 100, or 20 for
      keypoints.
    - `keypoint_sigmas`: the tolerance of each keypoint in OKS, relative to the square root of the object's area. By
      default COCO's for 17 points (persons), and otherwise .05 for every point. Figures are comparable only at equal
      sigmas.

    Ground-truth boxes and areas are the unmodified numbers of the file, so that a valid file gives the same metrics as
    pycocotools to the last bit. The exceptions are boxes that extend beyond their image by more than .01 pixels: they
    are clipped, as in training. A dataset without objects gives -1, which tables print as a dash.

    The arguments are not modified and nothing is printed. Cases that pycocotools fails on or silently mishandles are
    covered. Without detections, metrics are zero. For boxes and masks, `max_detections` may be any number above 10.
    Image and category ids may be any 64-bit integers. A missing `iscrowd` is 0, a missing `area` is that of the box or
    mask. The area of a detected mask is that of the mask, even if the result also has a box.

    Raises a `data.DatasetError` for invalid annotations, as `data.load_coco` does. Raises a `ValueError` with position,
    image and value for a result that has a field of a wrong type, a number that is not finite, a box of negative size,
    an unknown image or category, no box or no segmentation, a mask that is not of its image's size, or run lengths that
    do not add up to that size. Masks are checked even if boxes are evaluated. The number of keypoints must be that of
    the dataset's categories.

    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> found = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 40], "score": 0.9}]
    >>> metrics = evaluate_coco(annotations, found)
    >>> round(metrics.numbers["AP"], 3), round(metrics.numbers["AP50"], 3), metrics.per_class[0].name
    (0.7, 1.0, 'cat')
    """
    limit = MAX_DETECTIONS[iou_type] if max_detections is None else max_detections
    if iou_type != "keypoints" and limit <= 10:
        raise ValueError(f"max_detections must be above 10, got {limit}.")
    if limit < 1:
        raise ValueError(f"max_detections must be at least 1, got {limit}.")
    prepared = prepare(annotations, results, iou_type=iou_type, image_ids=image_ids)
    evaluation = prepared.evaluation
    evaluation.params.maxDets = [limit] if iou_type == "keypoints" else [1, 10, limit]
    if iou_type == "keypoints":
        evaluation.params.kpt_oks_sigmas = _sigmas(prepared.dataset.num_keypoints, keypoint_sigmas)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return CocoMetrics(
        {row[0]: mean_defined(_select(evaluation, *row[1:])) for row in _rows(iou_type, limit)},
        tuple(
            ClassMetrics(
                category_id=category.id,
                name=category.name,
                ap=_class_mean(evaluation, k, None, "all"),
                ap50=_class_mean(evaluation, k, 0.5, "all"),
                **{f"ap{area[0]}": _class_mean(evaluation, k, None, area) for area in evaluation.params.areaRngLbl[1:]},
            )
            for k, category in enumerate(prepared.dataset.categories)
        ),
        iou_type,
        limit,
    )


def _sigmas(count: int, sigmas: Sequence[float] | None) -> Float64[np.ndarray, " {count}"]:
    """The given sigmas after a check, or the defaults for this number of points."""
    if sigmas is None:
        sigmas = COCO_SIGMAS if count == len(COCO_SIGMAS) else (UNIFORM_SIGMA,) * count
    if len(sigmas) != count or not all(sigma > 0 for sigma in sigmas):
        raise ValueError(f"keypoint_sigmas must be {count} positive numbers, one per point, got {sigmas}.")
    return np.array(sigmas, np.float64)


def format_metrics(metrics: CocoMetrics) -> str:
    """Formats the metrics as the table that pycocotools prints, with a dash for undefined ones.

    >>> metrics = CocoMetrics({name: 0.5 for name, *_ in _rows("bbox", 100)}, (), "bbox", 100)
    >>> print(format_metrics(metrics).splitlines()[1].strip())
    Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500
    """
    limits = (1, 10, metrics.max_detections) if metrics.iou_type != "keypoints" else (metrics.max_detections,)
    lines = []
    for name, kind, threshold, area, limit in _rows(metrics.iou_type, metrics.max_detections):
        title = "Average Precision  (AP)" if kind == "precision" else "Average Recall     (AR)"
        iou = "0.50:0.95" if threshold is None else f"{threshold:.2f}"
        line = f" {title} @[ IoU={iou:<9} | area={area:>6} | maxDets={limits[limit]:>3} ] = "
        line += format_number(metrics.numbers[name])
        lines.append(line)
    return "\n".join(lines)


def format_per_class(metrics: CocoMetrics) -> str:
    """Formats AP, AP50 and AP by size of every category as a table, with a dash where there is no ground truth.

    >>> print(format_per_class(CocoMetrics({}, (ClassMetrics(7, "cat", 0.5, -1.0),), "bbox", 100)))
    category     AP   AP50    APs    APm    APl
    cat       0.500      –      –      –      –
    """
    columns = ("AP", "AP50", "APs", "APm", "APl")
    width = max(len("category"), *(len(entry.name) for entry in metrics.per_class)) if metrics.per_class else 8
    lines = [" ".join([f"{'category':<{width}}", *(f"{column:>6}" for column in columns)])]
    for entry in metrics.per_class:
        values = (getattr(entry, column.lower()) for column in columns)
        lines.append(" ".join([f"{entry.name:<{width}}", *(f"{format_number(value):>6}" for value in values)]))
    return "\n".join(lines)


def format_number(value: float) -> str:
    """Formats a metric in 0..1 with three digits, or as a dash if it is -1, i.e. without ground truth.

    >>> format_number(0.12345), format_number(-1.0)
    ('0.123', '–')
    """
    return f"{value:.3f}" if value >= 0 else "–"


def _rows(iou_type: IoUType, max_detections: int) -> tuple[tuple[str, str, float | None, str, int], ...]:
    """Returns the rows of the table: name, kind, IoU threshold (`None`: the mean over .50:.95), area, detection limit.

    The limit is a position in `(1, 10, max_detections)`, or for keypoints in `(max_detections,)`.
    """
    if iou_type == "keypoints":
        kinds = (("AP", "precision"), ("AR", "recall"))
        cells = (
            ("", None, "all"),
            ("50", 0.5, "all"),
            ("75", 0.75, "all"),
            ("m", None, "medium"),
            ("l", None, "large"),
        )
        return tuple(
            (kind + end, values, threshold, area, 0) for kind, values in kinds for end, threshold, area in cells
        )
    return (
        ("AP", "precision", None, "all", 2),
        ("AP50", "precision", 0.5, "all", 2),
        ("AP75", "precision", 0.75, "all", 2),
        ("APs", "precision", None, "small", 2),
        ("APm", "precision", None, "medium", 2),
        ("APl", "precision", None, "large", 2),
        ("AR1", "recall", None, "all", 0),
        ("AR10", "recall", None, "all", 1),
        (f"AR{max_detections}", "recall", None, "all", 2),
        ("ARs", "recall", None, "small", 2),
        ("ARm", "recall", None, "medium", 2),
        ("ARl", "recall", None, "large", 2),
    )


def _select(
    evaluation: COCOeval, kind: str, threshold: float | None, area: str, limit: int
) -> Float64[np.ndarray, "t ..."]:
    """Returns the precision (threshold, recall, category) or recall (threshold, category) for one row of the table."""
    params = evaluation.params
    values = evaluation.eval[kind][..., params.areaRngLbl.index(area), limit]
    return values if threshold is None else values[np.isclose(params.iouThrs, threshold)]


def _class_mean(evaluation: COCOeval, k: int, threshold: float | None, area: str) -> float:
    """Returns the AP of the category at position `k`."""
    return mean_defined(_select(evaluation, "precision", threshold, area, -1)[:, :, k])


def mean_defined(values: Float64[np.ndarray, "..."]) -> float:
    """Returns the mean of the values other than -1, which marks undefined ones, or -1 if there are none."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
