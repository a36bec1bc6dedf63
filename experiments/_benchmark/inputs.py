"""Random inputs for both sides, drawn from a seed: boxes, scores, maps, masks and images."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


IMAGE_SIZE = (800, 1216)  # for operators: a COCO image of 640×427 with its usual short side of 800, on a canvas
STRIDES = (4, 8, 16, 32)
NUM_CLASSES = 90  # torchvision's COCO detectors have 91 outputs, background included
Rng = np.random.Generator


def random_boxes(rng: Rng, n: int, *, image_size=IMAGE_SIZE, sides=(16.0, 400.0)) -> np.ndarray:
    """Draws boxes within an image, with log-uniform sides."""
    height, width = image_size
    size = np.exp(rng.uniform(np.log(sides[0]), np.log(np.minimum(sides[1], [width, height])), (n, 2)))
    corner = rng.uniform(0, 1, (n, 2)) * ([width, height] - size)
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def clustered_boxes(rng: Rng, n: int, *, objects: int, image_size=IMAGE_SIZE) -> np.ndarray:
    """Draws boxes around objects, like proposals and detections before suppression."""
    centres = random_boxes(rng, objects, image_size=image_size)[rng.integers(0, objects, n)]
    boxes = centres + rng.normal(0, 0.15, (n, 4)) * np.tile(centres[:, 2:] - centres[:, :2], 2)
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    return np.clip(boxes, 0, [image_size[1], image_size[0]] * 2).astype(np.float32)


def scored(rng: Rng, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Adds scores 0..1 without ties, since the order of ties would be arbitrary."""
    return {"boxes": boxes, "scores": ((rng.permutation(len(boxes)) + 0.5) / len(boxes)).astype(np.float32)}


def class_boxes(rng: Rng, proposals: int) -> dict[str, np.ndarray]:
    """Draws boxes and softmax scores per class, like those of a trained head: one to three classes above .05 for half
    of the proposals, background for the rest."""
    boxes = clustered_boxes(rng, proposals, objects=40)[:, None] + rng.normal(0, 3, (proposals, NUM_CLASSES, 4))
    logits = rng.normal(0, 1, (proposals, NUM_CLASSES + 1))
    logits[:, 0] += 4
    objects = rng.random(proposals) < 0.5
    for rank in range(3):
        likely = rng.integers(1, NUM_CLASSES + 1, proposals)
        logits[np.arange(proposals), likely] += objects * rng.uniform(5 - 1.5 * rank, 9 - 1.5 * rank, proposals)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = (scores / scores.sum(axis=1, keepdims=True))[:, 1:]
    return {"boxes": boxes.astype(np.float32), "scores": scores.astype(np.float32)}


def objects_and_anchors(rng: Rng, anchors: int) -> dict[str, np.ndarray]:
    """Draws 100 object boxes, and anchors."""
    return {"boxes": random_boxes(rng, 100), "anchors": random_boxes(rng, anchors, sides=(32, 512))}


def overlaps(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Computes the pairwise IoU `(objects, anchors)`."""
    a, b = boxes.T[:, :, None], anchors.T[:, None, :]  # (4, objects, 1), (4, 1, anchors)
    overlap = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod(axis=0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return (overlap / (areas[0] + areas[1] - overlap)).astype(np.float32)


def pyramid(rng: Rng, channels: int) -> list[np.ndarray]:
    """Draws feature maps `(c, h, w)` for the levels that boxes are pooled from."""
    height, width = IMAGE_SIZE
    return [rng.standard_normal((channels, height // s, width // s), np.float32) for s in STRIDES]


def photograph(rng: Rng, size: tuple[int, int]) -> np.ndarray:
    """Draws a uint8 image `(h, w, 3)` with structure at all scales, as in photographs, and a little noise."""
    height, width = size
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (3, 8, 24, 72, 200):
        noise = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(layer, np.float32) - 128) * (3 / cells) ** 0.4
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(128 + picture * 0.8, 0, 255).astype(np.uint8)


def ellipses(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns full-size uint8 masks `(n, h, w)`: the ellipse within each box, by pixel centres."""
    y, x = np.arange(size[0])[None, :, None] + 0.5, np.arange(size[1])[None, None, :] + 0.5
    x0, y0, x1, y1 = boxes.T[..., None, None]
    return ((((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2) <= 1).astype(np.uint8)


def ellipse_in_box(side: int) -> np.ndarray:
    """Returns the same ellipse in the frame of its box: the covered fraction of each cell, 0..255."""
    fine = (np.arange(side * 8) + 0.5) / (side * 4) - 1
    inside = (fine[:, None] ** 2 + fine[None] ** 2 <= 1).astype(np.float32)
    return np.rint(inside.reshape(side, 8, side, 8).mean(axis=(1, 3)) * 255).astype(np.uint8)


def mask_targets(rng: Rng) -> dict[str, np.ndarray]:
    """Draws 128 proposals matched with seven objects, with masks on the image and in the frame of their box."""
    boxes, matched = random_boxes(rng, 7, sides=(64, 400)), rng.integers(0, 7, 128)
    shifts = rng.uniform(-0.1, 0.1, (128, 4)) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)[matched]
    rois = (boxes[matched] + shifts).astype(np.float32)
    masks = {"masks": ellipses(boxes, IMAGE_SIZE), "masks_in_box": np.tile(ellipse_in_box(112), (7, 1, 1))}
    return {"boxes": boxes, "matched": matched, "rois": rois, **masks}


def objects(batch: int, size: tuple[int, int], count: int = 7) -> dict[str, np.ndarray]:
    """Draws boxes and labels for a batch, and one mask shared by all. A COCO image has 7.3 objects on average."""
    rng = np.random.default_rng(0)
    boxes = np.stack([random_boxes(rng, count, image_size=size, sides=(24, 250)) for _ in range(batch)])
    labels = rng.integers(0, NUM_CLASSES, (batch, count)).astype(np.int32)
    return {"boxes": boxes, "labels": labels, "mask_in_box": ellipse_in_box(112)}


def write_coco_folder(folder: Path, *, images: int, objects: int = 7) -> None:
    """Writes a dataset in COCO format with JPEGs and polygons, landscape and portrait images in turn.

    COCO images typically have 640×480 pixels, 160 kB and 7.3 objects.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for i in range(images):
        height, width = ((480, 640), (640, 480))[i % 2]
        name = f"{i:06}.jpg"
        Image.fromarray(photograph(rng, (height, width))).save(folder / "images" / name, quality=95)
        content["images"].append({"id": i + 1, "file_name": name, "height": height, "width": width})
        for box in random_boxes(rng, objects, image_size=(height, width), sides=(16, 300)):
            polygon = _blob(rng, box)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            shape = {"bbox": [*low.tolist(), *(high - low).tolist()], "segmentation": [polygon.reshape(-1).tolist()]}
            ids = {"id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": 1, "iscrowd": 0}
            content["annotations"].append(ids | shape | {"area": float(np.prod(high - low))})
    (folder / "annotations.json").write_text(json.dumps(content))


def _blob(rng: Rng, box: np.ndarray) -> np.ndarray:
    """Draws a star-shaped polygon `(points, 2)` within a box."""
    angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 25)), rng.uniform(0.6, 1.0, 25)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.round(centre + half * radii[:, None] * directions, 2).astype(np.float64)


def totals(batches: Iterable[tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Sums the figures of each batch over an epoch, to compare the data pipelines of both sides."""
    names = ("images", "pixels", "objects", "corners", "area")
    sums = [np.sum(np.array(column, np.float64), axis=0) for column in zip(*batches, strict=True)]
    return dict(zip(names, sums, strict=True))


def coco_sizes(rng: Rng, images: int) -> list[tuple[int, int]]:
    """Draws `(height, width)` of images as in COCO: long side 640, three of four landscape, common formats."""
    shorts = rng.choice(
        [480, 427, 426, 425, 428, 640, 361, 512], images, p=[0.34, 0.3, 0.1, 0.08, 0.05, 0.03, 0.05, 0.05]
    )
    tall = rng.random(images) < 0.25
    return [(640, int(short)) if t else (int(short), 640) for short, t in zip(shorts, tall, strict=True)]
