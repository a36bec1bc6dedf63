"""The page of an evaluation: metrics, curves, error costs, and the worst images."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from .. import data, evaluate
from ._page import file_name, write_page
from ._picture import Picture, class_entries


# Images that are included: the worst overall, the worst per class and per kind of error, and the maximum in total.
WORST, WORST_OF_CLASS, WORST_OF_KIND, MOST = 120, 6, 24, 300
# The maximum size of their thumbnails, boxes and masks in the page, in bytes.
IMAGE_BYTES = 14 * 2**20
# Detections drawn per image: the maximum number, best first, and the minimum score.
SHOWN, SHOWN_SCORE = 50, 0.05
CONFUSION_THRESHOLD = 0.5
MEANINGS = {
    "AP": "mean over IoU .50, .55, … .95",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "for objects below 32×32 pixels",
    "APm": "for objects from 32×32 to 96×96 pixels",
    "APl": "for objects above 96×96 pixels",
    "AR1": "recall with 1 detection per class and image",
    "AR10": "recall with 10 detections per class and image",
    "ARs": "recall of objects below 32×32 pixels",
    "ARm": "recall of objects from 32×32 to 96×96 pixels",
    "ARl": "recall of objects above 96×96 pixels",
}


def write_report(
    path: Path,
    dataset: data.CocoDataset,
    results: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, evaluate.CocoMetrics],
) -> None:
    """Writes the page. `metrics` are the metrics of `results` on `dataset`, for boxes and optionally for masks.

    Metrics of keypoints are left out: errors are analysed by IoU, not by OKS.
    """
    analyses = {
        kind: evaluate.analyze_errors(dataset, results, iou_type=one.iou_type, max_detections=one.max_detections)
        for kind, one in metrics.items()
        if one.iou_type != "keypoints"
    }
    kind, first = next(iter(analyses.items()))
    limit = metrics[kind].max_detections
    content = {
        "title": f"Evaluation: {path.resolve().parent.name}",
        "subtitle": f"{file_name(dataset.annotations_path)}: {len(dataset):,} images, "
        f"{len(first.objects.labels):,} objects, {len(results):,} detections",
        "num_images": len(dataset),
        "kinds": evaluate.ERROR_KINDS,
        "meanings": MEANINGS | {f"AR{limit}": f"recall with {limit} detections per class and image"},
        "classes": class_entries(dataset),
        "recall": first.recall.round(3).tolist(),
        "foreground_iou": first.foreground_iou,
        "background_iou": first.background_iou,
        "confusion_threshold": CONFUSION_THRESHOLD,
        "views": [view_of(metrics[kind], analysis) for kind, analysis in analyses.items()],
        "images": worst_images(dataset, results, list(analyses.values())),
    }
    write_page(
        path,
        title=content["title"],
        body="evaluation.html",
        scripts=("charts.js", "evaluation.js"),
        data=content,
    )


def view_of(metrics: evaluate.CocoMetrics, analysis: evaluate.ErrorAnalysis) -> dict[str, Any]:
    """The data of the page for boxes or for masks."""
    calibration = evaluate.calibration(analysis)
    verdicts, rows = analysis.detections.verdicts, evaluate.class_rows(analysis)
    by_kind = [int((verdicts == kind).sum()) for kind in range(len(evaluate.ERROR_KINDS) - 1)]
    return {
        "name": {"bbox": "boxes", "segm": "masks"}[metrics.iou_type],
        "numbers": metrics.numbers,
        "ap": analysis.ap,
        "costs": list(analysis.costs.values()),
        "counts": [
            *by_kind,
            int(analysis.objects.missed.sum()),
            int((verdicts >= 0).sum()),
            int((~analysis.objects.found).sum()),
        ],
        "false_positive_cost": analysis.false_positive_cost,
        "false_negative_cost": analysis.false_negative_cost,
        "precision": [row.round(4).tolist() if row[0] >= 0 else None for row in analysis.precision],
        "calibration": {
            "scores": calibration.scores.round(4).tolist(),
            "precision": calibration.precision.round(4).tolist(),
            "counts": calibration.counts.tolist(),
            "error": calibration.error,
        },
        "confusion": evaluate.confusion_matrix(analysis, score_threshold=CONFUSION_THRESHOLD).tolist(),
        "classes": [
            {
                "objects": row["objects"],
                "detections": row["detections"],
                "costs": [row[kind] for kind in evaluate.ERROR_KINDS],
                **{name: getattr(one, name) for name in ("ap", "ap50", "aps", "apm", "apl")},
            }
            for row, one in zip(rows, metrics.per_class, strict=True)
        ],
    }


def worst_images(
    dataset: data.CocoDataset,
    results: Sequence[Mapping[str, Any]],
    analyses: Sequence[evaluate.ErrorAnalysis],
) -> list[dict[str, Any]]:
    """Thumbnails, objects and detections of the worst images, up to a total of `IMAGE_BYTES`."""
    verdicts = np.full((len(results), len(analyses)), evaluate.IGNORED)
    ious = np.zeros((len(results), len(analyses)))
    about = np.full((len(results), len(analyses)), -1)  # annotation ids, which are positive; -1 for none
    missed: list[set[int]] = []
    for view, analysis in enumerate(analyses):
        verdicts[analysis.detections.results, view] = analysis.detections.verdicts
        ious[analysis.detections.results, view] = analysis.detections.ious
        object_ids = np.append(analysis.objects.annotation_ids, -1)  # index -1 selects -1, for no object
        about[analysis.detections.results, view] = object_ids[analysis.detections.objects]
        missed.append(set(object_ids[:-1][analysis.objects.missed].tolist()))
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, result in enumerate(results):
        if result["score"] >= SHOWN_SCORE:
            rows_of[result["image_id"]].append(row)
    entries, size = [], 0
    for index in ranking(analyses[0], [image.id for image in dataset.images]):
        image, objects = dataset.images[index], dataset.objects(index)
        picture, source = Picture(image), (image.height, image.width)
        rows = sorted(rows_of[image.id], key=lambda row: -results[row]["score"])[:SHOWN]
        entry = {
            **picture.entry,
            "objects": [
                {
                    "id": id,
                    "k": int(label),
                    "box": picture.box(box),
                    "crowd": bool(crowd),
                    "missed": [id in of_view for of_view in missed],
                    "mask": picture.mask(segmentation),
                }
                for box, label, crowd, id, segmentation in zip(
                    objects.boxes, objects.labels, objects.crowd, objects.annotation_ids, objects.segmentations,
                    strict=True,
                )
            ],
            "detections": [
                {
                    "k": label_of[results[row]["category_id"]],
                    "box": picture.box(corners(results[row], source)),
                    "score": round(results[row]["score"], 3),
                    "verdicts": verdicts[row].tolist(),
                    "about": about[row].tolist(),
                    "ious": ious[row].round(3).tolist(),
                    "mask": picture.mask(mask_of(results[row], source)),
                }
                for row in rows
            ],
        }  # fmt: skip
        size += len(json.dumps(entry))
        if size > IMAGE_BYTES:
            break
        entries.append(entry)
    return entries


def ranking(analysis: evaluate.ErrorAnalysis, image_ids: Sequence[int]) -> list[int]:
    """The positions of the images to include, the worst first.

    An image is worse the more missed objects and confident false detections it has: a missed object has weight 1, a
    false detection its score. The worst images overall come first, then the worst of each kind of error and of each
    class, so that each filter of the page has images to show.
    """
    detections, objects = analysis.detections, analysis.objects
    false, missed = detections.verdicts >= 0, objects.missed
    position = {id: index for index, id in enumerate(image_ids)}
    indices = np.array([position[id] for id in [*detections.image_ids[false], *objects.image_ids[missed]]], np.int64)
    labels = np.concatenate([detections.labels[false], objects.labels[missed]])
    kinds = np.concatenate([detections.verdicts[false], np.full(missed.sum(), evaluate.ERROR_KINDS.index("missed"))])
    weights = np.concatenate([detections.scores[false], np.ones(missed.sum())])

    def worst(rows: np.ndarray, count: int) -> list[int]:
        badness = np.bincount(indices[rows], weights[rows], len(image_ids))
        order = np.argsort(-badness, kind="stable")[:count]
        return order[badness[order] > 0].tolist()

    chosen = worst(np.ones(len(indices), bool), WORST)
    for kind in range(len(evaluate.ERROR_KINDS)):
        chosen += worst(kinds == kind, WORST_OF_KIND)
    for label in range(len(analysis.class_names)):
        chosen += worst(labels == label, WORST_OF_CLASS)
    return list(dict.fromkeys(chosen))[:MOST]


def mask_of(result: Mapping[str, Any], image_size: tuple[int, int]) -> Any:
    """A result's segmentation, of any COCO form, in the form that a dataset uses."""
    return data.parse_segmentation(result.get("segmentation"), image_size)


def corners(result: Mapping[str, Any], image_size: tuple[int, int]) -> np.ndarray:
    """The corners of a result's box, or of its mask's bounding box if it has no box."""
    bbox = result.get("bbox")
    if bbox is None:
        bbox = rle.toBbox(data.encode_segmentation(mask_of(result, image_size), image_size))  # type: ignore[arg-type]
    x, y, width, height = (float(number) for number in bbox)
    return np.array([x, y, x + width, y + height])
