"""COCO's evaluation by pycocotools, with its pitfalls guarded."""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


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
    annotations: str | os.PathLike | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"] = "bbox",
    image_ids: Sequence[int] | None = None,
    max_detections: int = 100,
) -> CocoMetrics:
    """COCO's twelve numbers, and the AP of every category, as pycocotools computes them.

    - `annotations`: a COCO JSON file, or its content.
    - `results`: detections in COCO's results format (`to_coco_results`), in pixels of the original images. Each needs
      `bbox` for boxes and `segmentation` for masks. It may be empty.
    - `image_ids`: evaluate these images only. Default all. Results on others are left aside.

    Neither argument is changed and nothing is printed. What pycocotools takes silently or fails at is dealt with: no
    detections at all give zeros; annotation ids, of which 0 counts as unmatched there, are renumbered; any number of
    `max_detections` above 10 is possible; missing `iscrowd` and `area` are 0 and the box's. Areas of detected masks are
    the masks', also where results have boxes too.

    Raises a `ValueError` that names the image or annotation id for: numbers that are not finite, a box of negative
    size, an image or category that the annotations do not have, a missing box or segmentation, a mask of another size
    than its image; and for annotations without images or categories.

    >>> annotations = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "iscrowd": 0}],
    ... }
    >>> found = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 40], "score": 0.9}]
    >>> metrics = evaluate_coco(annotations, found)
    >>> round(metrics.numbers["AP"], 3), round(metrics.numbers["AP50"], 3), metrics.per_class[0].name
    (0.7, 1.0, 'cat')
    """
    if max_detections <= 10:
        raise ValueError(f"max_detections must be above 10, got {max_detections}.")
    evaluation, names = prepare(annotations, results, iou_type=iou_type, image_ids=image_ids)
    evaluation.params.maxDets = [1, 10, max_detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return CocoMetrics(
        {row[0]: mean_defined(_select(evaluation, *row[1:])) for row in _rows(max_detections)},
        tuple(
            ClassMetrics(
                category_id=category_id,
                name=name,
                ap=_class_mean(evaluation, k, None, "all"),
                ap50=_class_mean(evaluation, k, 0.5, "all"),
                aps=_class_mean(evaluation, k, None, "small"),
                apm=_class_mean(evaluation, k, None, "medium"),
                apl=_class_mean(evaluation, k, None, "large"),
            )
            for k, (category_id, name) in enumerate(names.items())
        ),
        iou_type,
        max_detections,
    )


def prepare(
    annotations: str | os.PathLike | Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: Literal["bbox", "segm"],
    image_ids: Sequence[int] | None,
) -> tuple[COCOeval, dict[int, str]]:
    """pycocotools' evaluation of checked copies of both, still to be run, and the name of each category by its id.

    Ids of annotations and of results are their positions, counted from 1.
    """
    if not isinstance(annotations, Mapping):
        annotations = json.loads(Path(annotations).read_text(encoding="utf-8"))
        if not isinstance(annotations, Mapping):
            raise ValueError("The annotations are not a JSON object in COCO format.")
    images = {image["id"]: image for image in annotations.get("images", ())}
    categories = {category["id"]: category for category in annotations.get("categories", ())}
    for kind, entries in (("images", images), ("categories", categories)):
        if not entries:
            raise ValueError(f"The annotations have no {kind}.")
    unknown = sorted(set(image_ids or ()) - set(images))
    if unknown:
        raise ValueError(f"image_ids has {unknown[:10]}, which the annotations do not have.")
    base = {"images": list(images.values()), "categories": list(categories.values())}
    truth = [_ground_truth(a, images, categories, iou_type) for a in annotations.get("annotations", ())]
    found = [_detection(result, images, categories, iou_type) for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(base, truth), _index(base, found), iou_type)
    if image_ids is not None:
        evaluation.params.imgIds = sorted(set(image_ids))
    return evaluation, {id: str(categories[id].get("name", id)) for id in sorted(categories)}


def format_metrics(metrics: CocoMetrics) -> str:
    """The twelve numbers as the table that pycocotools prints.

    >>> metrics = CocoMetrics({name: 0.5 for name, *_ in _rows(100)}, (), "bbox", 100)
    >>> print(format_metrics(metrics).splitlines()[1].strip())
    Average Precision  (AP) @[ IoU=0.50      | area=   all | maxDets=100 ] = 0.500
    """
    limits = (1, 10, metrics.max_detections)
    lines = []
    for name, kind, threshold, area, limit in _rows(metrics.max_detections):
        title = "Average Precision  (AP)" if kind == "precision" else "Average Recall     (AR)"
        iou = "0.50:0.95" if threshold is None else f"{threshold:.2f}"
        line = f" {title} @[ IoU={iou:<9} | area={area:>6} | maxDets={limits[limit]:>3} ] = {metrics.numbers[name]:.3f}"
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
        cells = (f"{value:.3f}" if value >= 0 else "–" for value in values)
        lines.append(" ".join([f"{entry.name:<{width}}", *(f"{cell:>6}" for cell in cells)]))
    return "\n".join(lines)


def _ground_truth(
    annotation: Mapping[str, Any], images: dict[int, Any], categories: dict[int, Any], iou_type: str
) -> dict[str, Any]:
    """An annotation with all that pycocotools looks at. Its id is given later."""
    where = f"annotation {annotation.get('id')} of image {annotation.get('image_id')}"
    entry = _checked(annotation, where, images, categories, iou_type)
    entry["iscrowd"] = int(annotation.get("iscrowd", 0))
    area = annotation.get("area")
    if area is None:
        area = entry["bbox"][2] * entry["bbox"][3] if iou_type == "bbox" else float(rle.area(entry["segmentation"]))
    if not math.isfinite(area):
        raise ValueError(f"{where} has an area of {area}.")
    return entry | {"area": area}


def _detection(
    result: Mapping[str, Any], images: dict[int, Any], categories: dict[int, Any], iou_type: str
) -> dict[str, Any]:
    """A result as pycocotools' `loadRes` would make it, apart from its id."""
    where = f"a result on image {result.get('image_id')}"
    entry = _checked(result, where, images, categories, iou_type)
    score = result.get("score")
    if score is None or not math.isfinite(score):
        raise ValueError(f"{where} has a score of {score}.")
    if iou_type == "bbox":
        area = entry["bbox"][2] * entry["bbox"][3]
    else:
        area = float(rle.area(entry["segmentation"]))
    return entry | {"score": float(score), "area": area, "iscrowd": 0}


def _checked(
    entry: Mapping[str, Any], where: str, images: dict[int, Any], categories: dict[int, Any], iou_type: str
) -> dict[str, Any]:
    """Ids and geometry of an annotation or a result."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if image_id not in images:
        raise ValueError(f"{where}: the annotations have no image {image_id}.")
    if category_id not in categories:
        raise ValueError(f"{where} has category {category_id}, which the annotations do not have.")
    checked = {"image_id": image_id, "category_id": category_id}
    if iou_type == "segm":
        return checked | {"segmentation": _to_rle(entry.get("segmentation"), images[image_id], where)}
    box = entry.get("bbox")
    if box is None or len(box) != 4:
        raise ValueError(f"{where} has no bbox of four numbers: {box}.")
    if not all(math.isfinite(number) for number in box) or box[2] < 0 or box[3] < 0:
        raise ValueError(f"{where} has the bbox {list(box)}. Numbers must be finite, width and height not negative.")
    return checked | {"bbox": [float(number) for number in box]}


def _to_rle(segmentation: Any, image: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Polygons or run lengths as a compressed run-length encoding of the image's size."""
    if not segmentation:
        raise ValueError(f"{where} has no segmentation. Evaluate boxes, or leave it out.")
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        raise ValueError(f"{where}: the annotations give no height and width of this image.")
    if isinstance(segmentation, list):
        try:
            return dict(rle.merge(rle.frPyObjects(segmentation, height, width)))
        except Exception as error:
            raise ValueError(f"{where} has a segmentation that pycocotools cannot read: {error}") from error
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"{where} has a mask of size {list(segmentation['size'])}, its image is {[height, width]}.")
    if isinstance(segmentation["counts"], list):
        return dict(rle.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": segmentation["counts"]}


def _index(base: dict[str, list[Any]], entries: list[dict[str, Any]]) -> COCO:
    """pycocotools' index of annotations or results, with ids from 1: it takes a match with id 0 for none."""
    coco = COCO()
    dataset: Any = base | {"annotations": [entry | {"id": i} for i, entry in enumerate(entries, start=1)]}
    coco.dataset = dataset
    coco.createIndex()
    return coco


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
