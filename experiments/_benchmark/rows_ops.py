"""The table of operators, one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from . import inputs
from .agreement import Disagreement, require_close, require_close_in_norm
from .bench import Bench, Row, Table, number, ratio_cells


Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Operator:
    """A row: its name, the case of both workers, their inputs and options, and how closely results must agree."""

    name: str
    case: str
    arrays: Callable[[np.random.Generator], Arrays]
    options: dict[str, Any] = field(default_factory=dict)
    compare: Callable[[Arrays, Arrays], None] = require_close


def table() -> Table:
    """Operators on an 800×1216 image, or smaller ones."""
    return Table("ops", ("operator",), ("ours ms", "torchvision ms", "ratio", "spread"), _rows)


def _rows(bench: Bench) -> list[Row]:
    return [Row((operator.name,), partial(_measure, bench, operator)) for operator in _operators(bench)]


def _measure(bench: Bench, operator: Operator) -> tuple[str, ...]:
    ours, theirs = bench.shared()
    arrays = operator.arrays(np.random.default_rng(0))
    if theirs is not None:
        theirs.build(operator.case, arrays, **operator.options)
    ours.build(operator.case, arrays, **operator.options)
    result = ours.result()
    if theirs is not None:
        operator.compare(result, theirs.result())
    compared = bench.compare(ours, theirs)
    theirs_ms = None if compared.theirs is None else compared.theirs * 1e3
    return number(compared.ours * 1e3), number(theirs_ms), *ratio_cells(compared)


def _operators(bench: Bench) -> list[Operator]:
    quick = bench.quick
    channels, proposals, sampled = (64, 200, 64) if quick else (256, 1000, 512)
    body, image = ("resnet18", (320, 480)) if quick else ("resnet50", inputs.IMAGE_SIZE)
    anchors, pasted = (25_000, 20) if quick else (250_000, 100)
    height, width = inputs.IMAGE_SIZE
    nms = {"iou_threshold": 0.5}
    selection = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 100}
    pooling = {"levels": len(inputs.STRIDES), "backward": False}
    weights = {"body": body, "weights": bench.weights(f"backbone-{body}"), "backward": False}
    backward = Operator(
        f"backbone + FPN, {body}, 2 × 320×480, forward + backward",
        "backbone", partial(_images, shape=(2, 3, 320, 480)), weights | {"backward": True}, require_close_in_norm,
    )  # fmt: skip
    return [
        *(
            Operator(f"nms, {n:,} boxes{where}", "nms", partial(boxes, n=n), nms)
            for n in ((1000,) if quick else (1000, 10_000))
            for where, boxes in ((", spread", _spread), (", in clusters", _clusters))
        ),
        Operator(
            f"class-aware nms, {proposals:,} proposals × {inputs.NUM_CLASSES} classes",
            "box_selection", partial(_selection, n=proposals), selection,
        ),
        Operator(
            f"multi-level RoIAlign, {proposals:,}×{channels}×7×7",
            "roi_align", partial(_pooling, n=proposals, channels=channels), pooling,
        ),
        Operator(
            f"multi-level RoIAlign, {sampled}×{channels}×7×7, forward + backward",
            "roi_align", partial(_gradient_of_pooling, n=sampled, channels=channels), pooling | {"backward": True},
        ),
        Operator(
            f"mask paste, {pasted} onto {height}×{width}",
            "paste_masks", partial(_pasting, n=pasted), {"image_size": inputs.IMAGE_SIZE},
        ),
        Operator(
            f"mask paste, {pasted} onto {height}×{width}, ours in the memory of its last result",
            "redraw_masks", partial(_pasting, n=pasted), {"image_size": inputs.IMAGE_SIZE},
        ),
        Operator(
            f"mask paste, {pasted} onto {height}×{width}, whether above .5",
            "paste_masks", partial(_pasting, n=pasted), {"image_size": inputs.IMAGE_SIZE, "threshold": 0.5},
            _same_pixels,
        ),
        # Ours are taken from 112×112 masks in box frames, torchvision's from masks of the whole image.
        Operator("mask targets of 128 proposals, 28×28", "mask_targets", _mask_targets, compare=_similar_targets),
        Operator(f"pairwise IoU, 100 × {anchors:,}", "pairwise_iou", partial(_objects_and_anchors, n=anchors)),
        Operator(f"decode {anchors:,} boxes", "decode_boxes", partial(_deltas, n=anchors)),
        Operator(f"match {anchors:,} anchors with 100 objects", "match_boxes", partial(_iou, n=anchors)),
        Operator("resize, 480×640 to 800×1066", "resize", _picture, {"output_size": (800, 1066)}),
        Operator(
            f"backbone + FPN, {body}, {image[0]}×{image[1]}",
            "backbone", partial(_images, shape=(1, 3, *image)), weights,
        ),
        *([] if quick else [backward]),  # the training step's compiling is enough
    ]  # fmt: skip


def _similar_targets(ours: Arrays, theirs: Arrays) -> None:
    difference = float(np.abs(ours["targets"] - theirs["targets"]).mean())
    if not difference < 0.02:
        raise Disagreement(f"targets differ from torchvision's by {difference:.3f} on average")


def _same_pixels(ours: Arrays, theirs: Arrays) -> None:
    differing = int((ours["pasted"] != theirs["pasted"]).sum())
    if differing > 1e-6 * theirs["pasted"].size:
        raise Disagreement(f"{differing} pixels differ from torchvision's, more than one in a million")


def _spread(rng, *, n: int) -> Arrays:
    return {"boxes": inputs.random_boxes(rng, n), "scores": inputs.distinct_scores(rng, n)}


def _clusters(rng, *, n: int) -> Arrays:
    boxes = inputs.clustered_boxes(rng, n, objects=n // 5)
    return {"boxes": boxes, "scores": inputs.distinct_scores(rng, n)}


def _selection(rng, *, n: int) -> Arrays:
    proposals = inputs.clustered_boxes(rng, n, objects=40)
    boxes = proposals[:, None] + rng.normal(0, 3, (n, inputs.NUM_CLASSES, 4))
    return {"boxes": boxes.astype(np.float32), "scores": inputs.class_scores(rng, n, inputs.NUM_CLASSES)}


def _pooling(rng, *, n: int, channels: int) -> Arrays:
    maps = {f"map{i}": level for i, level in enumerate(inputs.pyramid(rng, channels))}
    return {**maps, "boxes": inputs.random_boxes(rng, n)}


def _gradient_of_pooling(rng, *, n: int, channels: int) -> Arrays:
    cotangent = rng.standard_normal((n, channels, 7, 7), np.float32)
    return {**_pooling(rng, n=n, channels=channels), "cotangent": cotangent}


def _pasting(rng, *, n: int) -> Arrays:
    return {"masks": rng.random((n, 28, 28), np.float32), "boxes": inputs.random_boxes(rng, n)}


def _mask_targets(rng) -> Arrays:
    boxes = inputs.random_boxes(rng, 7, sides=(64, 400))
    matched = rng.integers(0, 7, 128).astype(np.int32)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)[matched]
    return {
        "boxes": boxes,
        "matched": matched,
        "rois": (boxes[matched] + rng.uniform(-0.1, 0.1, (128, 4)) * sides).astype(np.float32),
        "masks": inputs.ellipses(boxes, inputs.IMAGE_SIZE),
        "masks_in_box": np.tile(inputs.ellipse_in_box(112), (7, 1, 1)),
    }


def _objects_and_anchors(rng, *, n: int) -> Arrays:
    return {"boxes": inputs.random_boxes(rng, 100), "anchors": inputs.random_boxes(rng, n, sides=(32, 512))}


def _deltas(rng, *, n: int) -> Arrays:
    return {"deltas": rng.normal(0, 0.5, (n, 4)).astype(np.float32), "anchors": inputs.random_boxes(rng, n)}


def _iou(rng, *, n: int) -> Arrays:
    arrays = _objects_and_anchors(rng, n=n)
    a, b = arrays["boxes"].T[:, :, None], arrays["anchors"].T[:, None, :]
    overlap = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod(axis=0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return {"iou": (overlap / (areas[0] + areas[1] - overlap)).astype(np.float32)}


def _picture(rng) -> Arrays:
    return {"image": inputs.photograph(rng, (480, 640))}


def _images(rng, *, shape: tuple[int, ...]) -> Arrays:
    return {"images": rng.standard_normal(shape, np.float32)}
