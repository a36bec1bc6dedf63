"""Measures of a dataset: its boxes against anchors, its images against canvases, and what looks wrong in it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from .. import data, ops


# Strides of the levels of a ResNet-FPN, and torchvision's anchors on them.
STRIDES = (4, 8, 16, 32, 64)
# Canvases are multiples of this.
STEP = 32
# Beyond this number of different sizes, they are rounded up more coarsely before canvases are proposed.
MOST_SIZES = 150

# A suspicious annotation has a side below this, in pixels,
TINY_SIDE = 2.0
# or sides that differ by more than this factor,
LONGEST_RATIO = 12.0
# or covers more than this part of its image,
WHOLE_IMAGE = 0.95
# or another box of its class covers it by this IoU, or one of another class by that,
SAME_CLASS_IOU, OTHER_CLASS_IOU = 0.9, 0.95
# or its segmentation's bounds agree with its box less than this IoU, or fill less than this part of it.
BOUNDS_IOU, LEAST_FILL = 0.8, 0.05


class Suspicion(NamedTuple):
    """An annotation that looks wrong: the image's position in the dataset, the row among its objects, and why."""

    kind: str
    image: int
    row: int
    what: str


class BucketUse(NamedTuple):
    """What a canvas is used for: how many images, how many that had to shrink to fit, and the part that is padding."""

    canvas: tuple[int, int]
    images: int
    shrunk: int
    padding: float


def resized_boxes(dataset: data.CocoDataset, *, min_size: int, max_size: int) -> np.ndarray:
    """The boxes of all objects but crowds, in pixels of their images after resizing: `(n, 4)`, image by image."""
    boxes = [np.zeros((0, 4))]
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        source = image.height, image.width
        height, width = ops.resized_size(source, min_size=min_size, max_size=max_size)
        scale = np.array([width / image.width, height / image.height] * 2)
        boxes.append(objects.boxes[~objects.crowd] * scale)
    return np.concatenate(boxes)


def labels_of(dataset: data.CocoDataset) -> np.ndarray:
    """The labels of the same objects."""
    parts = [dataset.objects(index) for index in range(len(dataset))]
    return np.concatenate([np.zeros(0, np.int64), *(part.labels[~part.crowd] for part in parts)])


def best_anchor_iou(
    boxes: np.ndarray, *, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]
) -> np.ndarray:
    """The IoU of each box with the anchor that covers it best, on any level.

    Anchors lie on a grid, and their IoU with a box falls with the distance of the centres along either axis: only the
    grid point next to the box's centre has to be looked at.
    """
    if len(sizes) != len(STRIDES):
        raise ValueError(f"There must be anchor sizes for each of the {len(STRIDES)} levels, got {len(sizes)}.")
    best = np.zeros(len(boxes))
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for stride, of_level in zip(STRIDES, sizes, strict=True):
        anchors = np.asarray(ops.anchor_grid((1, 1), stride=stride, sizes=of_level, aspect_ratios=aspect_ratios))
        offsets = np.maximum(np.round(centers / stride), 0) * stride
        for anchor in anchors.astype(np.float64):
            corners = np.tile(offsets, 2) + anchor
            shared = np.minimum(corners[:, 2:], boxes[:, 2:]) - np.maximum(corners[:, :2], boxes[:, :2])
            overlap = np.prod(np.maximum(shared, 0), axis=1)
            area = np.prod(anchor[2:] - anchor[:2]) + np.prod(sides, axis=1)
            best = np.maximum(best, overlap / (area - overlap))
    return best


def bucket_use(
    image_sizes: Sequence[tuple[int, int]], *, canvases: Sequence[tuple[int, int]], min_size: int, max_size: int
) -> list[BucketUse]:
    """How the images fill the canvases that `data.make_buckets` sorts them into."""
    uses = []
    for bucket in data.make_buckets(image_sizes, canvases=canvases, min_size=min_size, max_size=max_size):
        filled, shrunk = 0, 0
        for index in bucket.indices:
            wanted = ops.resized_size(image_sizes[index], min_size=min_size, max_size=max_size)
            height, width = ops.resized_size(
                image_sizes[index], min_size=min_size, max_size=max_size, canvas=bucket.canvas
            )
            filled += height * width
            # A pixel less is what rounding to the canvas may cost, no more.
            shrunk += wanted[0] - height > 1 or wanted[1] - width > 1
        total = len(bucket.indices) * bucket.canvas[0] * bucket.canvas[1]
        uses.append(BucketUse(bucket.canvas, len(bucket.indices), shrunk, 1 - filled / total))
    return uses


def padding_share(uses: Sequence[BucketUse]) -> float:
    """The part of all pixels that the network looks at which is padding."""
    pixels = [use.images * use.canvas[0] * use.canvas[1] for use in uses]
    return float(np.dot(pixels, [use.padding for use in uses]) / sum(pixels))


def propose_canvases(
    image_sizes: Sequence[tuple[int, int]], *, count: int, min_size: int, max_size: int
) -> list[tuple[int, int]]:
    """At most `count` canvases that hold every image unshrunk, with little padding.

    Starting with a canvas for each size, the two whose union adds the fewest pixels become one until few enough are
    left: not always the best, but near it.
    """
    sizes = [ops.resized_size(size, min_size=min_size, max_size=max_size) for size in image_sizes]
    step = STEP
    while True:
        rounded = -(-np.array(sizes) // step) * step
        canvases, counts = np.unique(rounded, axis=0, return_counts=True)
        if len(canvases) <= max(MOST_SIZES, count):
            break
        step *= 2
    while len(canvases) > count:
        areas = np.prod(canvases, axis=1)
        unions = np.maximum(canvases[:, None], canvases[None])
        added = np.prod(unions, axis=2) * (counts[:, None] + counts[None])
        added = added - (areas * counts)[:, None] - (areas * counts)[None]
        i, j = np.unravel_index(np.argmin(added + np.eye(len(canvases)) * 1e18), added.shape)
        canvases[i] = unions[i, j]
        counts[i] += counts[j]
        keep = np.arange(len(canvases)) != j
        canvases, counts = canvases[keep], counts[keep]
    return [(int(height), int(width)) for height, width in np.unique(canvases, axis=0)]


def find_suspicions(dataset: data.CocoDataset) -> list[Suspicion]:
    """Annotations that are likely mistakes. None need be: a person has to look at them."""
    found = []
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        names = [dataset.categories[label].name for label in objects.labels]
        boxes = objects.boxes.astype(np.float64)
        sides = boxes[:, 2:] - boxes[:, :2]
        for row, (width, height) in enumerate(sides.tolist()):
            if objects.crowd[row]:
                continue
            size = f"{width:.1f}×{height:.1f} pixels"
            if min(width, height) < TINY_SIDE:
                found.append(Suspicion("tiny box", index, row, f"{names[row]} of {size}"))
            elif max(width, height) > LONGEST_RATIO * min(width, height):
                found.append(Suspicion("long and thin box", index, row, f"{names[row]} of {size}"))
            if width * height > WHOLE_IMAGE * image.width * image.height:
                found.append(Suspicion("covers the whole image", index, row, f"{names[row]} of {size}"))
            found += _segmentation_suspicions(objects, row, index, names[row], (image.height, image.width))
        found += _doubled(objects, boxes, names, index)
    return found


def _doubled(objects: data.Objects, boxes: np.ndarray, names: list[str], index: int) -> list[Suspicion]:
    """Boxes that nearly equal an earlier one."""
    found = []
    rows = np.flatnonzero(~objects.crowd)
    if len(rows) < 2:
        return found
    xywh = np.concatenate([boxes[rows, :2], boxes[rows, 2:] - boxes[rows, :2]], axis=1)
    overlaps = np.asarray(rle.iou(xywh, xywh, [0] * len(rows)))
    same = objects.labels[rows][:, None] == objects.labels[rows][None]
    for a, b in np.argwhere(np.tril(overlaps > np.where(same, SAME_CLASS_IOU, OTHER_CLASS_IOU), -1)).tolist():
        row, other = int(rows[a]), int(rows[b])
        kind = "same object twice" if same[a, b] else "same box, two classes"
        what = f"{names[row]} and {names[other]} (annotation {objects.annotation_ids[other]}), IoU {overlaps[a, b]:.2f}"
        found.append(Suspicion(kind, index, row, what))
    return found


def _segmentation_suspicions(
    objects: data.Objects, row: int, index: int, name: str, image_size: tuple[int, int]
) -> list[Suspicion]:
    segmentation, box = objects.segmentations[row], objects.boxes[row].astype(np.float64)
    if segmentation is None:
        return []
    if isinstance(segmentation, dict):
        encoded: Any = segmentation
        x, y, width, height = (float(number) for number in rle.toBbox(encoded))
        bounds, slack = np.array([x, y, x + width, y + height]), 1.0
    else:
        points = np.concatenate(segmentation)
        bounds, slack = np.concatenate([points.min(axis=0), points.max(axis=0)]), 0.0
        encoded = data.encode_segmentation(segmentation, image_size)
    limit = np.array([image_size[1], image_size[0]] * 2)
    bounds = bounds.clip(0, limit)
    shared = np.prod(np.maximum(np.minimum(bounds[2:], box[2:]) - np.maximum(bounds[:2], box[:2]), 0))
    area, of_bounds = np.prod(box[2:] - box[:2]), np.prod(bounds[2:] - bounds[:2])
    iou = shared / max(area + of_bounds - shared, 1e-9)
    found = []
    far = np.abs(bounds - box).max() > 2 + slack  # annotators round to pixels
    if iou < BOUNDS_IOU and far:
        found.append(Suspicion("box and segmentation disagree", index, row, f"{name}: IoU of their bounds {iou:.2f}"))
    fill = float(rle.area(encoded)) / max(area, 1e-9)
    if fill < LEAST_FILL and area > 100:
        found.append(Suspicion("nearly empty segmentation", index, row, f"{name}: {fill:.0%} of its box"))
    return found
