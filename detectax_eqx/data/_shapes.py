"""A synthetic dataset in COCO format: coloured shapes on a noisy background, which partly occlude each other."""

import colorsys
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from ._masks import polygon_coverage
from ._outline import signed_area, trace_outlines


# COCO's ranges of object size, as the square root of the area. They keep a distance from the limits at 32 and 96, so
# that occlusion seldom moves a shape into another range.
SIZE_RANGES = ((10.0, 30.0), (36.0, 90.0), (100.0, 180.0))
# The probability of trying each range. Large shapes occlude much, and few of them fit.
SIZE_SHARES = (0.45, 0.45, 0.1)
# A shape is placed only where at least this fraction of every other shape stays visible.
MIN_VISIBLE = 0.5
# Visible pieces of fewer pixels are dropped from the annotation, as an annotator would not outline them.
MIN_PIECE = 6
ATTEMPTS = 20
# The keypoints of every shape: its outermost points as seen in the image, so that a flip exchanges two of them.
KEYPOINTS = ("top", "right", "bottom", "left")
SKELETON = ((1, 2), (2, 3), (3, 4), (4, 1))


class _Shape(NamedTuple):
    """A shape in an image: its kind and unoccluded area, and the coverage and outlines of its visible part.

    `keypoints`: `(x, y, visibility)` of its points.
    """

    kind: int
    area: float
    coverage: Float64[np.ndarray, "h w"]
    outlines: list[Float64[np.ndarray, "p 2"]]
    keypoints: Float64[np.ndarray, "4 3"]


def write_shapes_dataset(
    folder: str | Path,
    *,
    num_images: int,
    seed: int = 0,
    image_size: tuple[int, int] = (128, 128),
    max_objects: int = 6,
    class_colors: bool = True,
    suffix: str = ".png",
    keypoints: bool = False,
) -> tuple[Path, Path]:
    """Writes images of circles, squares, triangles and stars with their boxes and polygons, in COCO format.

    Shapes are rotated at random and drawn from COCO's three size ranges, as far as they fit the image. Later shapes
    occlude up to half of earlier ones. Polygons, boxes and areas describe the visible part. Category ids are 1, 3, 4
    and 7, with gaps as in COCO. The same arguments give the same dataset; for given options, image `i` depends only on
    `seed` and `i`.

    - `image_size`: `(height, width)`. `max_objects`: an image has between one and this many objects, if there is room.
    - `class_colors`: give each class its own hue, slightly varied, so that a detector learns within minutes. Otherwise
      hues are random, and only the form distinguishes the classes.
    - `suffix`: `.png`, or `.jpg` for lossy compression.
    - `keypoints`: also annotate the top, right, bottom and left point of every shape; occluded points are hidden.

    Returns the annotation file and the image folder, the arguments of `load_coco`.

    Raises a `ValueError` if an option is out of range.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     annotations, images = write_shapes_dataset(folder, num_images=2, seed=0)
    ...     annotations.name, sorted(path.name for path in images.iterdir())
    ('annotations.json', ['000001.png', '000002.png'])
    """
    if num_images < 1 or max_objects < 1 or seed < 0:
        numbers = f"got {num_images}, {max_objects} and {seed}."
        raise ValueError(f"num_images and max_objects must be positive and seed not negative, {numbers}")
    if min(image_size) < 32:
        raise ValueError(f"image_size must be at least 32×32 to hold a shape, got {image_size}.")
    if suffix not in (".png", ".jpg"):
        raise ValueError(f'suffix must be ".png" or ".jpg", got "{suffix}".')
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    points = {"keypoints": KEYPOINTS, "skeleton": SKELETON} if keypoints else {}
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": id, "name": name, "supercategory": "shape"} | points for name, id, _ in KINDS],
    }
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        pixels, shapes = _draw_image(rng, image_size, max_objects, class_colors)
        name = f"{index + 1:06}{suffix}"
        Image.fromarray(pixels).save(images / name, quality=95)
        height, width = image_size
        content["images"].append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for shape in shapes:
            annotation = {"id": len(content["annotations"]) + 1, "image_id": index + 1, **_annotate(shape, keypoints)}
            content["annotations"].append(annotation)
    annotations = Path(folder) / "annotations.json"
    annotations.write_text(json.dumps(content))
    return annotations, images


def _draw_image(
    rng: np.random.Generator, image_size: tuple[int, int], max_objects: int, class_colors: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], list[_Shape]]:
    canvas = _ground(rng, image_size)
    shapes: list[_Shape] = []
    wanted = rng.integers(1, max_objects + 1)
    for _ in range(ATTEMPTS * wanted):
        placed = _place(rng, image_size, shapes)
        if placed is None:
            continue
        shapes = placed
        new = shapes[-1]
        hue = new.kind / len(KINDS) + rng.uniform(-0.06, 0.06) if class_colors else rng.uniform()
        color = np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.6, 1), rng.uniform(0.7, 1))) * 255
        canvas += (color - canvas) * new.coverage[..., None]
        if len(shapes) == wanted:
            break
    canvas += rng.normal(0, 6, canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), shapes


def _ground(rng: np.random.Generator, image_size: tuple[int, int]) -> Float64[np.ndarray, "h w 3"]:
    """Draws a background of muted colours that vary slowly, with stripes."""
    height, width = image_size
    patches = Image.fromarray(rng.integers(50, 170, (4, 4, 3), np.uint8))
    ground = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    ground = 0.3 * ground + 0.7 * ground.mean(axis=2, keepdims=True)
    y, x = np.mgrid[:height, :width] * rng.uniform(0.1, 0.6) * rng.choice([-1, 1], (2, 1, 1))
    angle = rng.uniform(0, np.pi)
    return ground + 12 * np.sin(x * np.cos(angle) + y * np.sin(angle))[..., None]


def _place(rng: np.random.Generator, image_size: tuple[int, int], shapes: list[_Shape]) -> list[_Shape] | None:
    """Adds a random shape on top. Returns all shapes, or `None` if the new one does not fit or occludes too much."""
    kind = int(rng.integers(len(KINDS)))
    low, high = SIZE_RANGES[rng.choice(len(SIZE_RANGES), p=SIZE_SHARES)]
    outline = KINDS[kind][2]()
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outline = outline @ turn.T * (rng.uniform(low, high) / np.sqrt(signed_area(outline)))
    outline -= outline.min(axis=0)
    height, width = image_size
    room = np.array([width, height]) - outline.max(axis=0)  # (x, y)
    if room.min() <= 0:
        return None
    outline = np.round(outline + rng.uniform(0, room), 2)
    coverage = polygon_coverage(outline, size=image_size)
    updated = []
    for shape in shapes:
        if not np.any(shape.coverage * coverage):
            updated.append(shape)
            continue
        visible = shape.coverage * (1 - coverage)
        outlines, has_hole = trace_outlines(visible >= 0.5)
        outlines = [outline for outline in outlines if signed_area(outline) >= MIN_PIECE]
        if has_hole or not outlines or visible.sum() < MIN_VISIBLE * shape.area:
            return None
        updated.append(shape._replace(coverage=visible, outlines=outlines, keypoints=_hide(shape.keypoints, coverage)))
    return [*updated, _Shape(kind, float(coverage.sum()), coverage, [outline], _outermost(outline))]


def _outermost(outline: Float64[np.ndarray, "p 2"]) -> Float64[np.ndarray, "4 3"]:
    """The top, right, bottom and left point of an outline, all visible."""
    x, y = outline.T
    places = outline[[y.argmin(), x.argmax(), y.argmax(), x.argmin()]]  # (4, 2)
    return np.concatenate([places, np.full((4, 1), 2.0)], axis=1)


def _hide(keypoints: Float64[np.ndarray, "4 3"], coverage: Float64[np.ndarray, "h w"]) -> Float64[np.ndarray, "4 3"]:
    """Marks the points under a new shape as hidden."""
    height, width = coverage.shape
    columns, rows = keypoints[:, :2].astype(np.int64).T
    covered = coverage[rows.clip(0, height - 1), columns.clip(0, width - 1)] >= 0.5  # (4,)
    return np.where(covered[:, None] & (np.arange(3) == 2), 1.0, keypoints)


def _annotate(shape: _Shape, keypoints: bool) -> dict[str, Any]:
    points = np.concatenate(shape.outlines)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    named = {"keypoints": shape.keypoints.ravel().tolist(), "num_keypoints": len(KEYPOINTS)} if keypoints else {}
    return named | {
        "category_id": KINDS[shape.kind][1],
        "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(sum(signed_area(outline) for outline in shape.outlines), 2),
        "segmentation": [outline.ravel().tolist() for outline in shape.outlines],
        "iscrowd": 0,
    }


def _regular(corners: int) -> Float64[np.ndarray, "{corners} 2"]:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _circle() -> Float64[np.ndarray, "p 2"]:
    return _regular(48)


def _square() -> Float64[np.ndarray, "p 2"]:
    return _regular(4)


def _triangle() -> Float64[np.ndarray, "p 2"]:
    return _regular(3)


def _star() -> Float64[np.ndarray, "p 2"]:
    return _regular(10) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]


# Name, category id and outline of each class.
KINDS: tuple[tuple[str, int, Callable[[], Float64[np.ndarray, "p 2"]]], ...] = (
    ("circle", 1, _circle),
    ("square", 3, _square),
    ("triangle", 4, _triangle),
    ("star", 7, _star),
)
