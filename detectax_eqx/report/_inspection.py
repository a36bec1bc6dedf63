"""Statistics of a dataset: the fit of anchors to boxes and of canvases to images, and suspicious annotations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from .. import data, ops


# The strides of the levels of a ResNet-FPN, on which torchvision's anchors lie.
STRIDES = (4, 8, 16, 32, 64)
# Canvases are multiples of this.
STEP = 32
# If there are more different sizes, they are rounded up more coarsely before canvases are proposed.
MOST_SIZES = 150

# An annotation is suspicious if its box has a side shorter than this, in pixels,
TINY_SIDE = 2.0
# if the ratio of its sides exceeds this,
LONGEST_RATIO = 12.0
# if it covers more than this fraction of its image,
WHOLE_IMAGE = 0.95
# if its IoU with another box of the same class, or of another class, exceeds these,
SAME_CLASS_IOU, OTHER_CLASS_IOU = 0.9, 0.95
# if the IoU of its segmentation's bounds with its box is below this, or if it fills less than this fraction of the box.
BOUNDS_IOU, LEAST_FILL = 0.8, 0.05


class Suspicion(NamedTuple):
    """A suspicious annotation.

    - `kind`: the kind of suspicion. `what`: a description of this annotation.
    - `image`: the position of the image in the dataset. `row`: the row among the image's objects.
    """

    kind: str
    image: int
    row: int
    what: str


class BucketUse(NamedTuple):
    """The use of a canvas.

    - `images`: the number of images on the canvas. `shrunk`: how many of them are shrunk to fit it.
    - `padding`: the fraction of its pixels that is padding, 0..1.
    """

    canvas: tuple[int, int]
    images: int
    shrunk: int
    padding: float


def resized_boxes(dataset: data.CocoDataset, *, min_size: int, max_size: int) -> np.ndarray:
    """The boxes of all objects except crowds, `(n, 4)`, in pixels of the resized images, in the order of the images."""
    boxes = [np.zeros((0, 4))]
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        source = image.height, image.width
        height, width = ops.resized_size(source, min_size=min_size, max_size=max_size)
        scale = np.array([width / image.width, height / image.height] * 2)
        boxes.append(objects.boxes[~objects.crowd] * scale)
    return np.concatenate(boxes)


def labels_of(dataset: data.CocoDataset) -> np.ndarray:
    """The labels of all objects except crowds, `(n,)`, in the order of `resized_boxes`."""
    parts = [dataset.objects(index) for index in range(len(dataset))]
    return np.concatenate([np.zeros(0, np.int64), *(part.labels[~part.crowd] for part in parts)])


def best_anchor_iou(
    boxes: np.ndarray, *, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]
) -> np.ndarray:
    """The highest IoU of each box with any anchor on any level.

    The IoU of a box with anchors on a grid decreases with the distance of their centres along either axis. So only the
    anchors at the grid point nearest to the box's centre have to be compared.
    """
    if len(sizes) != len(STRIDES):
        raise ValueError(f"sizes must have an entry for each of the {len(STRIDES)} levels, got {len(sizes)}.")
    best = np.zeros(len(boxes))
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for stride, of_level in zip(STRIDES, sizes, strict=True):
        # (a, 4), centred at the origin of the grid
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
    """How the images use the canvases to which `data.make_buckets` assigns them."""
    uses = []
    for bucket in data.make_buckets(image_sizes, canvases=canvases, min_size=min_size, max_size=max_size):
        filled, shrunk = 0, 0
        for index in bucket.indices:
            wanted = ops.resized_size(image_sizes[index], min_size=min_size, max_size=max_size)
            height, width = ops.resized_size(
                image_sizes[index], min_size=min_size, max_size=max_size, canvas=bucket.canvas
            )
            filled += height * width
            # A difference of 1 pixel may be due to rounding.
            shrunk += wanted[0] - height > 1 or wanted[1] - width > 1
        total = len(bucket.indices) * bucket.canvas[0] * bucket.canvas[1]
        uses.append(BucketUse(bucket.canvas, len(bucket.indices), shrunk, 1 - filled / total))
    return uses


def padding_share(uses: Sequence[BucketUse]) -> float:
    """The fraction of the network's input pixels that is padding."""
    pixels = [use.images * use.canvas[0] * use.canvas[1] for use in uses]
    return float(np.dot(pixels, [use.padding for use in uses]) / sum(pixels))


def propose_canvases(
    image_sizes: Sequence[tuple[int, int]], *, count: int, min_size: int, max_size: int
) -> list[tuple[int, int]]:
    """At most `count` canvases with little padding on which no image has to be shrunk.

    A greedy search, which is near-optimal: it starts with one canvas per image size and repeatedly merges the two
    canvases whose union adds the fewest pixels.
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
        unions = np.maximum(canvases[:, None], canvases[None])  # (n, n, 2)
        added = np.prod(unions, axis=2) * (counts[:, None] + counts[None])
        added = added - (areas * counts)[:, None] - (areas * counts)[None]
        i, j = np.unravel_index(np.argmin(added + np.eye(len(canvases)) * 1e18), added.shape)
        canvases[i] = unions[i, j]
        counts[i] += counts[j]
        keep = np.arange(len(canvases)) != j
        canvases, counts = canvases[keep], counts[keep]
    return [(int(height), int(width)) for height, width in np.unique(canvases, axis=0)]


def find_suspicions(dataset: data.CocoDataset) -> list[Suspicion]:
    """Annotations that are likely mistakes. They may be correct, so a person should check them."""
    suspicions = []
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
                suspicions.append(Suspicion("tiny box", index, row, f"{names[row]} of {size}"))
            elif max(width, height) > LONGEST_RATIO * min(width, height):
                suspicions.append(Suspicion("long and thin box", index, row, f"{names[row]} of {size}"))
            if width * height > WHOLE_IMAGE * image.width * image.height:
                suspicions.append(Suspicion("covers the whole image", index, row, f"{names[row]} of {size}"))
            suspicions += _segmentation_suspicions(objects, row, index, names[row], (image.height, image.width))
        suspicions += _doubled(objects, boxes, names, index)
    return suspicions


def _doubled(objects: data.Objects, boxes: np.ndarray, names: list[str], index: int) -> list[Suspicion]:
    """Boxes that nearly coincide with an earlier box of the same image."""
    suspicions = []
    rows = np.flatnonzero(~objects.crowd)
    if len(rows) < 2:
        return suspicions
    xywh = np.concatenate([boxes[rows, :2], boxes[rows, 2:] - boxes[rows, :2]], axis=1)
    overlaps = np.asarray(rle.iou(xywh, xywh, [0] * len(rows)))
    same = objects.labels[rows][:, None] == objects.labels[rows][None]
    for a, b in np.argwhere(np.tril(overlaps > np.where(same, SAME_CLASS_IOU, OTHER_CLASS_IOU), -1)).tolist():
        row, other = int(rows[a]), int(rows[b])
        kind = "same object twice" if same[a, b] else "same box, two classes"
        what = f"{names[row]} and {names[other]} (annotation {objects.annotation_ids[other]}), IoU {overlaps[a, b]:.2f}"
        suspicions.append(Suspicion(kind, index, row, what))
    return suspicions


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
    suspicions = []
    far = np.abs(bounds - box).max() > 2 + slack  # annotation tools round to pixels
    if iou < BOUNDS_IOU and far:
        suspicions.append(
            Suspicion("box and segmentation disagree", index, row, f"{name}: IoU of their bounds {iou:.2f}")
        )
    fill = float(rle.area(encoded)) / max(area, 1e-9)
    if fill < LEAST_FILL and area > 100:
        suspicions.append(Suspicion("nearly empty segmentation", index, row, f"{name}: {fill:.0%} of its box"))
    return suspicions
