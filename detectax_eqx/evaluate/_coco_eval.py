"""COCO's evaluation by pycocotools, with its pitfalls guarded."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from pycocotools.cocoeval import COCOeval

from ._prepare import Truth, prepare


@dataclass(frozen=True)
class ClassMetrics:
    """AP over IoU .50:.95 and AP at IoU .50 of one category, and the first for its small, medium and large objects.

    Each is -1 if the ground truth has no such object.
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
    """What `evaluate_coco` gives. `dataclasses.asdict` makes it fit for JSON.

    - `numbers`: COCO's twelve, 0..1, in their usual order: `AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl`. One
      that no ground truth bears on (no large object, say) is -1, as in pycocotools. `AR100` is called after
      `max_detections`.
    - `per_class`: in the order of the category ids.
    - `iou_type`: `"bbox"` or `"segm"`. `max_detections`: best detections of each category an image that count.
    """

    numbers: dict[str, float]
    per_class: tuple[ClassMetrics, ...]
    iou_type: Literal["bbox", "segm"]
    max_detections: int


def evaluate_coco(
    annotations: Truth,
    results: Sequence[Any],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Sequence[int] | None = None,
    max_detections: int = 100,
) -> CocoMetrics:
    """COCO's twelve numbers, and the AP of every category, as pycocotools computes them.

    - `annotations`: a dataset that `data.load_coco` made; or a COCO JSON file, its URL, or its content, which
      `data.load_annotations` then reads by the same rules: what is repaired there is repaired here, and what is refused
      there is refused.
    - `results`: detections in COCO's results format (`to_coco_results`), in pixels of the original images. Each needs
      `bbox` for boxes and `segmentation` for masks, in any form of COCO's. It may be empty.
    - `image_ids`: evaluate these images only. Default all. Results on others are left aside.

    Boxes and areas of the truth are the file's own numbers, so that those of a sound file give pycocotools' results to
    the last bit. The exception is a box that reaches out of its image by more than .01 pixels: it counts as clipped, as
    it does in training. A dataset without objects gives -1, which tables print as a dash.

    Neither argument is changed and nothing is printed. What pycocotools takes silently or fails at is dealt with: no
    detections at all give zeros; any number of `max_detections` above 10 is possible; ids of images and categories may
    be any that fit into 64 bits; missing `iscrowd` and `area` are 0 and the box's, or the mask's. Areas of detected
    masks are the masks', also where results have boxes too.

    Raises a `data.DatasetError` for annotations as `data.load_coco` does, and a `ValueError` that names position, image
    and value for a result with: a field of a wrong type, a number that is not finite, a box of negative size, an image
    or category that the annotations do not have, a missing box or segmentation, a mask of another size than its image,
    run lengths that do not add up to it. All that a result has is checked, its mask also where boxes are evaluated.

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
    if max_detections <= 10:
        raise ValueError(f"max_detections must be above 10, got {max_detections}.")
    prepared = prepare(annotations, results, iou_type=iou_type, image_ids=image_ids)
    evaluation = prepared.evaluation
    evaluation.params.maxDets = [1, 10, max_detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return CocoMetrics(
        {row[0]: mean_defined(_select(evaluation, *row[1:])) for row in _rows(max_detections)},
        tuple(
            ClassMetrics(
                category_id=category.id,
                name=category.name,
                ap=_class_mean(evaluation, k, None, "all"),
                ap50=_class_mean(evaluation, k, 0.5, "all"),
                aps=_class_mean(evaluation, k, None, "small"),
                apm=_class_mean(evaluation, k, None, "medium"),
                apl=_class_mean(evaluation, k, None, "large"),
            )
            for k, category in enumerate(prepared.dataset.categories)
        ),
        iou_type,
        max_detections,
    )


def format_metrics(metrics: CocoMetrics) -> str:
    """The twelve numbers as the table that pycocotools prints, with a dash for one that is not defined.

    >>> metrics = CocoMetrics({name: 0.5 for name, *_ in _rows(100)}, (), "bbox", 100)
    >>> print(format_metrics(metrics).splitlines()[1].strip())
    Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500
    """
    limits = (1, 10, metrics.max_detections)
    lines = []
    for name, kind, threshold, area, limit in _rows(metrics.max_detections):
        title = "Average Precision  (AP)" if kind == "precision" else "Average Recall     (AR)"
        iou = "0.50:0.95" if threshold is None else f"{threshold:.2f}"
        line = f" {title} @[ IoU={iou:<9} | area={area:>6} | maxDets={limits[limit]:>3} ] = "
        line += format_number(metrics.numbers[name])
        lines.append(line)
    return "\n".join(lines)


def format_per_class(metrics: CocoMetrics) -> str:
    """AP, AP50 and AP by size of every category as a table; a dash where the ground truth has no such object.

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
    """A metric in 0..1 with three digits; a dash for -1, which stands for one that no ground truth bears on.

    >>> format_number(0.12345), format_number(-1.0)
    ('0.123', '–')
    """
    return f"{value:.3f}" if value >= 0 else "–"


def _rows(max_detections: int) -> tuple[tuple[str, str, float | None, str, int], ...]:
    """The rows of the table: name, what, IoU threshold (`None`: the mean over .50:.95), area, limit of detections.

    The limit is a position among 1, 10 and `max_detections`.
    """
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
    """Precision (threshold, recall, category) or recall (threshold, category) of one row of the table."""
    params = evaluation.params
    values = evaluation.eval[kind][..., params.areaRngLbl.index(area), limit]
    return values if threshold is None else values[np.isclose(params.iouThrs, threshold)]


def _class_mean(evaluation: COCOeval, k: int, threshold: float | None, area: str) -> float:
    """The AP of the category at position `k`."""
    return mean_defined(_select(evaluation, "precision", threshold, area, 2)[:, :, k])


def mean_defined(values: Float64[np.ndarray, "..."]) -> float:
    """The mean of what is defined, that is not -1; -1 if nothing is."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0
