"""The report of an evaluation: numbers, curves, costs of errors, and the worst images to look at."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from .. import data, draw, evaluate
from ._masks import mask_size, shrink_mask
from ._page import file_name, thumbnail, write_page


# The images that are kept: the worst of all, and the worst for each class and each kind of error.
WORST, WORST_OF_CLASS, WORST_OF_KIND, MOST = 120, 6, 24, 300
# Their thumbnails and boxes stop being added at this size, in bytes of the page.
IMAGE_BYTES = 14 * 2**20
# Detections drawn for an image: at most this many of the best, of at least this score.
SHOWN, SHOWN_SCORE = 50, 0.05
CONFUSION_THRESHOLD = 0.5
MEANINGS = {
    "AP": "mean over IoU .50, .55, … .95",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "of objects below 32×32 pixels",
    "APm": "of objects from 32×32 to 96×96 pixels",
    "APl": "of objects above 96×96 pixels",
    "AR1": "recall, one detection of each class per image",
    "AR10": "recall, ten detections of each class per image",
    "ARs": "recall of those below 32×32 pixels",
    "ARm": "recall of those from 32×32 to 96×96 pixels",
    "ARl": "recall of those above 96×96 pixels",
}


def write_report(
    path: Path,
    dataset: data.CocoDataset,
    results: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, evaluate.CocoMetrics],
) -> None:
    """Writes the page. `metrics` are those of `results` on `dataset`, for boxes and perhaps for masks."""
    analyses = {
        kind: evaluate.analyze_errors(dataset, results, iou_type=one.iou_type, max_detections=one.max_detections)
        for kind, one in metrics.items()
    }
    limit = next(iter(metrics.values())).max_detections
    first = next(iter(analyses.values()))
    content = {
        "title": f"Evaluation: {path.resolve().parent.name}",
        "subtitle": f"{file_name(dataset.annotations_path)}: {len(dataset):,} images, "
        f"{len(first.objects.labels):,} objects, {len(results):,} detections",
        "num_images": len(dataset),
        "kinds": evaluate.ERROR_KINDS,
        "meanings": MEANINGS | {f"AR{limit}": f"recall, {limit} detections of each class per image"},
        "classes": [
            {"name": category.name, "color": "#{:02x}{:02x}{:02x}".format(*draw.class_color(k))}
            for k, category in enumerate(dataset.categories)
        ],
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
    """What the page says of boxes, or of masks."""
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
    """Thumbnail, objects and detections of the worst images, as many as the page has room for."""
    verdicts = np.full((len(results), len(analyses)), evaluate.IGNORED)
    ious = np.zeros((len(results), len(analyses)))
    about = np.full((len(results), len(analyses)), -1)  # ids of annotations, which are positive
    missed: list[set[int]] = []
    for view, analysis in enumerate(analyses):
        verdicts[analysis.detections.results, view] = analysis.detections.verdicts
        ious[analysis.detections.results, view] = analysis.detections.ious
        object_ids = np.append(analysis.objects.annotation_ids, -1)  # the last one for no object, row -1
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
        source = image.height, image.width
        uri, shown = thumbnail(data.read_image(image.path, size=source))
        small, scale = mask_size(shown), np.array([shown[1] / source[1], shown[0] / source[0]] * 2)
        rows = sorted(rows_of[image.id], key=lambda row: -results[row]["score"])[:SHOWN]
        entry = {
            "id": image.id,
            "name": file_name(image.path),
            "src": uri,
            "width": shown[1],
            "height": shown[0],
            "mask_width": small[1],
            "mask_height": small[0],
            "objects": [
                {
                    "id": id,
                    "k": int(label),
                    "box": (box * scale).round(1).tolist(),
                    "crowd": bool(crowd),
                    "missed": [id in of_view for of_view in missed],
                    "mask": shrink_mask(segmentation, source, small),
                }
                for box, label, crowd, id, segmentation in zip(
                    objects.boxes, objects.labels, objects.crowd, objects.annotation_ids, objects.segmentations,
                    strict=True,
                )
            ],
            "detections": [
                {
                    "k": label_of[results[row]["category_id"]],
                    "box": (corners(results[row], source) * scale).round(1).tolist(),
                    "score": round(results[row]["score"], 3),
                    "verdicts": verdicts[row].tolist(),
                    "about": about[row].tolist(),
                    "ious": ious[row].round(3).tolist(),
                    "mask": shrink_mask(mask_of(results[row], source), source, small),
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
    """Positions of the images to keep, the worst first: those of the most missed objects and confident errors.

    A missed object weighs 1, a false detection its score. The worst of all come first, then those of each kind of
    error and of each class, so that a filter finds some.
    """
    found, objects = analysis.detections, analysis.objects
    false, missed = found.verdicts >= 0, objects.missed
    position = {id: index for index, id in enumerate(image_ids)}
    indices = np.array([position[id] for id in [*found.image_ids[false], *objects.image_ids[missed]]], np.int64)
    labels = np.concatenate([found.labels[false], objects.labels[missed]])
    kinds = np.concatenate([found.verdicts[false], np.full(missed.sum(), evaluate.ERROR_KINDS.index("missed"))])
    weights = np.concatenate([found.scores[false], np.ones(missed.sum())])

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
    """A result's segmentation, whatever its form, as a dataset has them."""
    return data.parse_segmentation(result.get("segmentation"), image_size)


def corners(result: Mapping[str, Any], image_size: tuple[int, int]) -> np.ndarray:
    """The corners of a result's box, or of the box around its mask if it has none."""
    bbox = result.get("bbox")
    if bbox is None:
        bbox = rle.toBbox(data.encode_segmentation(mask_of(result, image_size), image_size))  # type: ignore[arg-type]
    x, y, width, height = (float(number) for number in bbox)
    return np.array([x, y, x + width, y + height])
