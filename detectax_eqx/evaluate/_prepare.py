"""Converts checked datasets and results to pycocotools' format."""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data import CocoDataset, encode_segmentation, load_annotations
from ._checks import IoUType, check_results, mask_areas


# The ground truth of an evaluation: a dataset, or an argument of `load_annotations`.
Truth = CocoDataset | str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A pycocotools evaluation that has not been run yet, and the original ids behind its ids.

    In the evaluation, the id of an image is its rank in the sorted ids, from 1, and that of a category is its label
    plus 1, since pycocotools converts large ids to floats. Annotations and results are also numbered from 1, since
    pycocotools treats a match with id 0 as no match.

    - `image_ids`: the original image ids by rank. `annotation_ids`: the original annotation ids by number.
    """

    evaluation: COCOeval
    dataset: CocoDataset
    image_ids: Int64[np.ndarray, " i"]
    annotation_ids: Int64[np.ndarray, " m"]


def prepare(
    annotations: Truth,
    results: Sequence[Any],
    *,
    iou_type: IoUType,
    image_ids: Sequence[int] | None,
) -> Prepared:
    """Checks the dataset and the results, and sets up their evaluation."""
    dataset = annotations if isinstance(annotations, CocoDataset) else load_annotations(annotations)
    for kind, entries in (("images", dataset.images), ("categories", dataset.categories)):
        if not entries:
            raise ValueError(f"The dataset has no {kind}.")
    ids = np.array([image.id for image in dataset.images], np.int64)
    unknown = sorted(set(image_ids or ()) - set(ids.tolist()))
    if unknown:
        raise ValueError(f"image_ids has {unknown[:10]}, which the annotations do not have.")
    order = np.argsort(ids)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(1, len(ids) + 1)
    checked = check_results(results, dataset, iou_type=iou_type)
    if iou_type == "keypoints" and not dataset.num_keypoints:
        raise ValueError(f"{dataset.annotations_path}: no category names keypoints. Evaluate boxes instead.")
    truth, annotation_ids = _truth(dataset, rank, iou_type)
    if iou_type == "bbox":
        shapes, areas = checked.boxes_xywh.tolist(), checked.boxes_xywh[:, 2] * checked.boxes_xywh[:, 3]
    elif iou_type == "segm":
        shapes: list[Any] = checked.masks
        areas = mask_areas(shapes)
    else:
        assert checked.keypoints is not None
        shapes, areas = _flat(checked.keypoints), np.ptp(checked.keypoints[..., :2], axis=1).prod(axis=1)
    detected = _entries(rank[checked.images], checked.labels, areas, np.zeros(len(areas)), iou_type, shapes)
    for entry, score in zip(detected, checked.scores.tolist(), strict=True):
        entry["score"] = score
    all_sizes = dataset.sizes
    sizes = [all_sizes[index] for index in order]
    base = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes, start=1)],
        "categories": [{"id": k} for k in range(1, dataset.num_classes + 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(base, truth), _index(base, detected), iou_type)
    if image_ids is not None:
        position = {id: index for index, id in enumerate(ids.tolist())}
        evaluation.params.imgIds = sorted({int(rank[position[id]]) for id in image_ids})
    return Prepared(evaluation, dataset, ids[order], annotation_ids)


def _flat(keypoints: Float64[np.ndarray, "n k 3"]) -> list[list[float]]:
    return [points.ravel().tolist() for points in keypoints]


def _truth(
    dataset: CocoDataset, rank: Int64[np.ndarray, " i"], iou_type: IoUType
) -> tuple[list[dict[str, Any]], Int64[np.ndarray, " m"]]:
    """Returns the dataset's objects as pycocotools annotations, and their ids in the file.

    Areas are those of the file or, where it has none, those of the boxes or masks.
    """
    entries, ids = [], []
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        areas = objects.boxes_xywh[:, 2] * objects.boxes_xywh[:, 3]
        if iou_type == "bbox":
            shapes = objects.boxes_xywh.tolist()
        elif iou_type == "keypoints":
            assert objects.keypoints is not None
            shapes = _flat(objects.keypoints)
        else:
            missing = [segmentation is None for segmentation in objects.segmentations]
            if any(missing):
                id = objects.annotation_ids[missing.index(True)]
                what = "has no segmentation. Evaluate boxes instead, or remove it."
                raise ValueError(f"{dataset.annotations_path}: annotation {id} of image {image.id} {what}")
            size = image.height, image.width
            shapes = [encode_segmentation(segmentation, size) for segmentation in objects.segmentations]
            areas = mask_areas(shapes)
        areas = np.where(np.isnan(objects.areas), areas, objects.areas)
        ranks = np.full(len(areas), rank[index])
        of_image = _entries(ranks, objects.labels.astype(np.int64), areas, objects.crowd, iou_type, shapes)
        if objects.keypoints is not None and iou_type == "keypoints":
            # An object without labelled points is ignored; OKS measures points that are not labelled from the box.
            labelled = (objects.keypoints[..., 2] > 0).sum(axis=1).tolist()
            for entry, box, count in zip(of_image, objects.boxes_xywh.tolist(), labelled, strict=True):
                entry |= {"bbox": box, "num_keypoints": count}
        entries += of_image
        ids += objects.annotation_ids
    return entries, np.array(ids, np.int64)


def _entries(
    ranks: Int64[np.ndarray, " n"],
    labels: Int64[np.ndarray, " n"],
    areas: Float64[np.ndarray, " n"],
    crowd: np.ndarray,
    iou_type: IoUType,
    shapes: Sequence[Any],
) -> list[dict[str, Any]]:
    """Returns annotations or results in pycocotools' format, without ids."""
    key = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[iou_type]
    columns = ranks.tolist(), (labels + 1).tolist(), areas.tolist(), crowd.astype(np.int64).tolist(), shapes
    return [
        {"image_id": image, "category_id": category, "area": area, "iscrowd": group, key: shape}
        for image, category, area, group, shape in zip(*columns, strict=True)
    ]


def _index(base: dict[str, list[Any]], entries: list[dict[str, Any]]) -> COCO:
    """Numbers annotations or results from 1 and indexes them with pycocotools."""
    for id, entry in enumerate(entries, start=1):
        entry["id"] = id
    coco = COCO()
    dataset: Any = base | {"annotations": entries}
    coco.dataset = dataset
    coco.createIndex()
    return coco
