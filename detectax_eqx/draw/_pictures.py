"""Draws detections and ground truth: boxes, masks, keypoints, class names and scores."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, UInt8
from PIL import Image, ImageDraw

from .._types import Detections, Targets
from ._color import class_color
from ._fonts import Face, FontFile, drawable, face, measure, write
from ._keypoints import ABSENT, SHOWN, Skeletons, draw_keypoints
from ._labels import label, outline, place


# Width of a crowd's stripes and of the gaps between them, in line widths.
_STRIPE = 3
# Pixels between the two halves of a comparison.
_GAP = 6


class _Style(NamedTuple):
    """Drawing options, see `draw_detections`."""

    mask_threshold: float
    mask_opacity: float
    line_width: int | None
    font_size: int | None
    font: FontFile | None
    skeletons: Skeletons | None

    def face(self, image: np.ndarray) -> Face:
        return face((image.shape[0], image.shape[1]), self.font_size, self.font)


class _Rows(NamedTuple):
    """The objects to draw, best first. `frames`: the boxes that the masks fill. `crowd`: drawn with stripes.

    `points`: `(x, y, state)` of each keypoint, see `draw_keypoints`.
    """

    boxes: Float64[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    texts: list[str]
    masks: Float[np.ndarray, "n s t"] | None
    frames: Float64[np.ndarray, "n 4"]
    crowd: Bool[np.ndarray, " n"]
    points: Float64[np.ndarray, "n k 3"] | None


def draw_detections(
    image: UInt8[Array | np.ndarray, "h w 3"],
    detections: Detections,
    *,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    mask_opacity: float = 0.45,
    keypoint_threshold: float = 0.0,
    line_width: int | None = None,
    font_size: int | None = None,
    font: FontFile | None = None,
    skeletons: Skeletons | None = None,
) -> Image.Image:
    """Draws detections on an image: masks, boxes, keypoints, and a label with the class name and score of each.

    - `image`: RGB. `detections`: those of this image, with boxes in its pixels, which may extend beyond it.
    - `class_names`: by label. A label without a name is shown as its number.
    - `score_threshold`: only detections with at least this score are drawn, the best on top.
    - `mask_threshold`: mask values above it belong to the object. `mask_opacity`: opacity of its colour, 0..1.
    - `keypoint_threshold`: only keypoints with a higher score are drawn. For `models.KeypointRCNN`, scores are logits.
    - `skeletons`: by label, the bones between keypoints as pairs of positions, such as `data.Category.skeleton`.
    - `line_width`, `font_size`: in pixels, by default in proportion to the image size.
    - `font`: a TrueType or OpenType file. Default: Pillow's font. Characters that it lacks are drawn in an installed
      font that has them, or escaped, for example as `\\u732b`, with a warning if no font has them.

    A class has the same colour in every picture. An image without detections is returned unchanged.

    >>> boxes, scores = np.array([[4, 4, 30, 20]], np.float32), np.array([0.9], np.float32)
    >>> detections = Detections(boxes, scores, np.array([0], np.int32), np.array([True]))
    >>> draw_detections(np.zeros((32, 48, 3), np.uint8), detections, class_names=["cat"]).size
    (48, 32)
    """
    pixels, style = np.asarray(image), _Style(mask_threshold, mask_opacity, line_width, font_size, font, skeletons)
    names = _drawable(class_names, pixels, style)
    return _draw(pixels, _rows_of_detections(detections, names, score_threshold, keypoint_threshold), style)


def draw_targets(
    image: UInt8[Array | np.ndarray, "h w 3"],
    targets: Targets,
    *,
    crowd: Bool[Array | np.ndarray, " n"] | None = None,
    class_names: Sequence[str] | None = None,
    mask_threshold: float = 0.5,
    mask_opacity: float = 0.45,
    line_width: int | None = None,
    font_size: int | None = None,
    font: FontFile | None = None,
    skeletons: Skeletons | None = None,
) -> Image.Image:
    """Draws the ground truth of an image in the style of `draw_detections`, with the same options.

    - `crowd`: rows that stand for a group of objects, such as `data.Objects.crowd`. They are drawn with stripes.
    - `class_names`: by label. A class whose name is empty gets no label.

    Keypoints that are labelled but hidden are drawn as rings.

    >>> boxes = np.array([[4, 4, 30, 20]], np.float32)
    >>> targets = Targets(boxes, np.array([0], np.int32), np.array([True]))
    >>> draw_targets(np.zeros((32, 48, 3), np.uint8), targets, class_names=["cat"]).size
    (48, 32)
    """
    pixels, style = np.asarray(image), _Style(mask_threshold, mask_opacity, line_width, font_size, font, skeletons)
    return _draw(pixels, _rows_of_targets(targets, crowd, _drawable(class_names, pixels, style)), style)


def draw_comparison(
    image: UInt8[Array | np.ndarray, "h w 3"],
    targets: Targets,
    detections: Detections,
    *,
    crowd: Bool[Array | np.ndarray, " n"] | None = None,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    mask_opacity: float = 0.45,
    keypoint_threshold: float = 0.0,
    line_width: int | None = None,
    font_size: int | None = None,
    font: FontFile | None = None,
    skeletons: Skeletons | None = None,
    titles: tuple[str, str] = ("ground truth", "prediction"),
) -> Image.Image:
    """Draws an image twice, side by side under titles: the ground truth on the left, the detections on the right.

    The other arguments are as for `draw_detections` and `draw_targets`. All boxes are in pixels of `image`.

    >>> box, label, true = np.array([[4, 4, 30, 20]], np.float32), np.array([0], np.int32), np.array([True])
    >>> targets, found = Targets(box, label, true), Detections(box, np.array([0.9], np.float32), label, true)
    >>> draw_comparison(np.zeros((32, 48, 3), np.uint8), targets, found).size[0]  # 48 + a gap of 6 + 48
    102
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    style = _Style(mask_threshold, mask_opacity, line_width, font_size, font, skeletons)
    names = _drawable(class_names, pixels, style)
    halves = (
        _draw(pixels, _rows_of_targets(targets, crowd, names), style),
        _draw(pixels, _rows_of_detections(detections, names, score_threshold, keypoint_threshold), style),
    )
    face = style.face(pixels)
    shown = drawable(titles, face)
    strip = max(sum(measure(title, face)[1:]) for title in shown) + 4
    sheet = Image.new("RGB", (2 * width + _GAP, height + strip), "white")
    canvas = ImageDraw.Draw(sheet)
    for position, (half, title) in enumerate(zip(halves, shown, strict=True)):
        left = position * (width + _GAP)
        write(canvas, (left + 1, 1), title, face, (0, 0, 0))
        sheet.paste(half, (left, strip))
    return sheet


def _rows_of_detections(
    detections: Detections, class_names: Sequence[str] | None, threshold: float, keypoint_threshold: float
) -> _Rows:
    if np.ndim(detections.boxes) != 2:
        raise ValueError(f"detections must be those of one image, got boxes of shape {np.shape(detections.boxes)}.")
    scores = np.asarray(detections.scores, np.float64)
    rows = np.flatnonzero(np.asarray(detections.valid) & (scores >= threshold))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    labels = np.asarray(detections.labels)[rows]
    boxes = np.asarray(detections.boxes, np.float64)[rows]
    texts = [
        f"{_class_name(int(label), class_names)} {score:.2f}" for label, score in zip(labels, scores[rows], strict=True)
    ]
    masks = None if detections.masks is None else np.asarray(detections.masks, np.float32)[rows]
    points = None
    if detections.keypoints is not None:
        points = np.asarray(detections.keypoints, np.float64)[rows]
        points[..., 2] = np.where(points[..., 2] > keypoint_threshold, SHOWN, ABSENT)
    frames = np.asarray(detections.frames, np.float64)[rows]
    return _Rows(boxes, labels, texts, masks, frames, np.zeros(len(rows), bool), points)


def _rows_of_targets(
    targets: Targets, crowd: Bool[Array | np.ndarray, " n"] | None, class_names: Sequence[str] | None
) -> _Rows:
    if np.ndim(targets.boxes) != 2:
        raise ValueError(f"targets must be those of one image, got boxes of shape {np.shape(targets.boxes)}.")
    crowd = np.zeros(len(targets.boxes), bool) if crowd is None else np.asarray(crowd)
    if len(crowd) != len(targets.boxes):
        raise ValueError(f"crowd must have a row for each of the {len(targets.boxes)} targets, got {len(crowd)}.")
    rows = np.flatnonzero(np.asarray(targets.valid))
    labels, crowd = np.asarray(targets.labels)[rows], crowd[rows]
    texts = [
        _class_name(int(label), class_names) + (" (crowd)" if many else "")
        for label, many in zip(labels, crowd, strict=True)
    ]
    masks = None
    if targets.masks is not None:
        masks = np.asarray(targets.masks)[rows]
        masks = masks.astype(np.float32) / (255 if masks.dtype == np.uint8 else 1)
    frames = targets.boxes if targets.mask_boxes is None else targets.mask_boxes
    boxes, frames = (np.asarray(x, np.float64)[rows] for x in (targets.boxes, frames))
    points = None if targets.keypoints is None else np.asarray(targets.keypoints, np.float64)[rows]
    return _Rows(boxes, labels, texts, masks, frames, crowd, points)


def _drawable(names: Sequence[str] | None, image: np.ndarray, style: _Style) -> Sequence[str] | None:
    """Escapes all class names, not only those in this picture, so that a run warns only once."""
    return None if names is None else drawable(names, style.face(image))


def _class_name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def _draw(image: UInt8[np.ndarray, "h w 3"], rows: _Rows, style: _Style) -> Image.Image:
    """Draws masks, then boxes, then keypoints, then labels on top. Within each, the first row is drawn last."""
    if not 0 <= style.mask_opacity <= 1:
        raise ValueError(f"mask_opacity must be in 0..1, got {style.mask_opacity}.")
    if style.line_width is not None and style.line_width < 1:
        raise ValueError(f"line_width must be at least 1, got {style.line_width}.")
    height, width = image.shape[:2]
    line_width = max(1, round(min(height, width) / 240)) if style.line_width is None else style.line_width
    face = style.face(image)
    colors = [class_color(int(label)) for label in rows.labels]
    order = range(len(rows.boxes) - 1, -1, -1)
    pixels = image.copy()
    whole = np.ones((1, 1), np.float32)  # the mask of a crowd without one
    for row in order:
        if rows.masks is not None or rows.crowd[row]:
            mask = whole if rows.masks is None else rows.masks[row]
            stripe = _STRIPE * line_width if rows.crowd[row] else None
            _blend(pixels, mask, rows.frames[row], colors[row], style, stripe)
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    for row in order:
        outline(canvas, rows.boxes[row], colors[row], line_width, (height, width))
    if rows.points is not None:
        bones = dict(enumerate(style.skeletons or ()))
        for row in order:
            skeleton = bones.get(int(rows.labels[row]), ())
            draw_keypoints(canvas, rows.points[row], skeleton, colors[row], line_width, (height, width))
    # Labels are placed best first, so that the best one gets the best position, and drawn in reverse order.
    placed = []
    named = [row for row in range(len(rows.boxes)) if rows.texts[row]]
    for row in named:
        placed.append(place(rows.texts[row], face, rows.boxes[row], placed, line_width, (height, width)))
    for row, spot in zip(reversed(named), reversed(placed), strict=True):
        label(canvas, rows.texts[row], face, spot, colors[row])
    return picture


def _blend(
    pixels: UInt8[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "s t"],
    frame: Float64[np.ndarray, " 4"],
    color: tuple[int, int, int],
    style: _Style,
    stripe: int | None,
) -> None:
    """Tints the pixels under a mask that fills `frame`, and draws its contour. Only the part in the image is resized.

    - `stripe`: if given, only diagonal stripes of this width in pixels are tinted.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = frame.tolist()
    left, top = max(0, math.floor(_finite(x0))), max(0, math.floor(_finite(y0)))
    right, bottom = min(width, math.ceil(_finite(x1))), min(height, math.ceil(_finite(y1)))
    if not np.isfinite(frame).all() or left >= right or top >= bottom or x0 >= x1 or y0 >= y1:
        return
    rows, columns = mask.shape
    source = (
        max(0.0, (left - x0) / (x1 - x0) * columns),
        max(0.0, (top - y0) / (y1 - y0) * rows),
        min(float(columns), (right - x0) / (x1 - x0) * columns),
        min(float(rows), (bottom - y0) / (y1 - y0) * rows),
    )
    size = right - left, bottom - top
    resized = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR, box=source)
    inside = np.asarray(resized) > style.mask_threshold
    tinted = inside
    if stripe is not None:
        y, x = np.ogrid[top:bottom, left:right]
        tinted = inside & ((x + y) // stripe % 2 == 0)
    part = pixels[top:bottom, left:right]
    tint = np.array(color, np.float32)
    part[tinted] = (part[tinted] * (1 - style.mask_opacity) + tint * style.mask_opacity + 0.5).astype(np.uint8)
    part[inside & ~_eroded(inside)] = color


def _eroded(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels whose four neighbours all belong to the mask."""
    around = np.pad(mask, 1)
    return around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]


def _finite(number: float) -> int | float:
    return number if math.isfinite(number) else 0
