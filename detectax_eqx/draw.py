"""Pictures of detections and of ground truth: boxes, masks, class names, scores."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from ._types import Detections, Targets


# Neighbouring labels get distant hues; the golden ratio never comes back to one already used.
_GOLDEN = 0.6180339887498949
_DARKEST = 0.42  # luminance of the darkest class colour, 0..1
_PADDING = 2  # pixels of a label's background around its text


def draw_detections(
    image: UInt8[Array | np.ndarray, "h w 3"],
    detections: Detections,
    *,
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    mask_opacity: float = 0.45,
    line_width: int | None = None,
    font_size: int | None = None,
) -> Image.Image:
    """A picture of what was found: masks, boxes, and a label with class name and score for each.

    - `image`: RGB. `detections`: of this one image, boxes in its pixels; boxes may reach beyond it.
    - `class_names`: by label; a label without a name is shown as its number.
    - `score_threshold`: only detections with at least this score are drawn, the best on top.
    - `mask_threshold`, `mask_opacity`: what counts as the object, and how much its colour covers.
    - `line_width`, `font_size`: in pixels, by default in proportion to the image.

    A class has the same colour in every picture. An image without detections comes back as it was.

    >>> boxes, scores = np.array([[4, 4, 30, 20]], np.float32), np.array([0.9], np.float32)
    >>> detections = Detections(boxes, scores, np.array([0], np.int32), np.array([True]))
    >>> draw_detections(np.zeros((32, 48, 3), np.uint8), detections, class_names=["cat"]).size
    (48, 32)
    """
    if np.ndim(detections.boxes) != 2:
        raise ValueError(f"detections must be those of one image, got boxes of shape {np.shape(detections.boxes)}.")
    scores = np.asarray(detections.scores, np.float64)
    rows = np.flatnonzero(np.asarray(detections.valid) & (scores >= score_threshold))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    labels = np.asarray(detections.labels)[rows]
    boxes = np.asarray(detections.boxes, np.float64)[rows]
    return _draw(
        np.asarray(image),
        boxes,
        labels,
        [
            f"{_class_name(int(label), class_names)} {score:.2f}"
            for label, score in zip(labels, scores[rows], strict=True)
        ],
        None if detections.masks is None else np.asarray(detections.masks, np.float32)[rows],
        boxes,
        mask_threshold,
        mask_opacity,
        line_width,
        font_size,
    )


def draw_targets(
    image: UInt8[Array | np.ndarray, "h w 3"],
    targets: Targets,
    *,
    class_names: Sequence[str] | None = None,
    mask_threshold: float = 0.5,
    mask_opacity: float = 0.45,
    line_width: int | None = None,
    font_size: int | None = None,
) -> Image.Image:
    """A picture of the ground truth of one image, as `draw_detections` draws what was found.

    >>> boxes = np.array([[4, 4, 30, 20]], np.float32)
    >>> targets = Targets(boxes, np.array([0], np.int32), np.array([True]))
    >>> draw_targets(np.zeros((32, 48, 3), np.uint8), targets, class_names=["cat"]).size
    (48, 32)
    """
    if np.ndim(targets.boxes) != 2:
        raise ValueError(f"targets must be those of one image, got boxes of shape {np.shape(targets.boxes)}.")
    rows = np.flatnonzero(np.asarray(targets.valid))
    labels = np.asarray(targets.labels)[rows]
    masks = None
    if targets.masks is not None:
        masks = np.asarray(targets.masks)[rows]
        masks = masks.astype(np.float32) / (255 if masks.dtype == np.uint8 else 1)
    frames = targets.boxes if targets.mask_boxes is None else targets.mask_boxes
    return _draw(
        np.asarray(image),
        np.asarray(targets.boxes, np.float64)[rows],
        labels,
        [_class_name(int(label), class_names) for label in labels],
        masks,
        np.asarray(frames, np.float64)[rows],
        mask_threshold,
        mask_opacity,
        line_width,
        font_size,
    )


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, the same at all times and distinct on dark and light ground.

    >>> class_color(0) == class_color(0) != class_color(1)
    True
    """
    hue = (0.58 + label * _GOLDEN) % 1.0
    # Every third class is paler or deeper, so that hues that come near each other still differ.
    saturation, value = ((0.85, 1.0), (0.65, 1.0), (0.9, 0.8))[label % 3]
    color = colorsys.hsv_to_rgb(hue, saturation, value)
    # Blue and violet are dark: mixed with white up to a luminance that stands out from shadows.
    white = max(0.0, (_DARKEST - _luminance(color)) / (1 - _luminance(color)))
    red, green, blue = (round(255 * (part + (1 - part) * white)) for part in color)
    return red, green, blue


def _luminance(color: tuple[float, float, float]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _class_name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def _draw(
    image: UInt8[np.ndarray, "h w 3"],
    boxes: Float64[np.ndarray, "n 4"],
    labels: Int[np.ndarray, " n"],
    texts: list[str],
    masks: Float[np.ndarray, "n s t"] | None,
    frames: Float64[np.ndarray, "n 4"],
    mask_threshold: float,
    mask_opacity: float,
    line_width: int | None,
    font_size: int | None,
) -> Image.Image:
    """Masks below boxes below labels; of each, the first row comes on top."""
    if not 0 <= mask_opacity <= 1:
        raise ValueError(f"mask_opacity must be in 0..1, got {mask_opacity}.")
    if line_width is not None and line_width < 1:
        raise ValueError(f"line_width must be at least 1, got {line_width}.")
    height, width = image.shape[:2]
    line_width = max(1, round(min(height, width) / 240)) if line_width is None else line_width
    font = ImageFont.load_default(max(10, round(min(height, width) / 38)) if font_size is None else font_size)
    colors = [class_color(int(label)) for label in labels]
    order = range(len(boxes) - 1, -1, -1)
    pixels = image.copy()
    if masks is not None:
        for row in order:
            _blend(pixels, masks[row], frames[row], colors[row], mask_threshold, mask_opacity)
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    for row in order:
        _outline(canvas, boxes[row], colors[row], line_width, (height, width))
    # Labels are placed best first, so that the best has the best place, and drawn the other way round.
    placed = []
    for row in range(len(boxes)):
        placed.append(_place(canvas, texts[row], font, boxes[row], placed, line_width, (height, width)))
    for row in order:
        _label(canvas, texts[row], font, placed[row], colors[row])
    return picture


def _blend(
    pixels: UInt8[np.ndarray, "h w 3"],
    mask: Float[np.ndarray, "s t"],
    frame: Float64[np.ndarray, " 4"],
    color: tuple[int, int, int],
    threshold: float,
    opacity: float,
) -> None:
    """Tints the pixels under a mask filling `frame`, and draws its contour. Only what lies in the image is resized."""
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
    inside = np.asarray(resized) > threshold
    part = pixels[top:bottom, left:right]
    tint = np.array(color, np.float32)
    part[inside] = (part[inside] * (1 - opacity) + tint * opacity + 0.5).astype(np.uint8)
    part[inside & ~_eroded(inside)] = color


def _eroded(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The pixels whose four neighbours belong to the mask as well."""
    around = np.pad(mask, 1)
    return around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]


def _finite(number: float) -> int | float:
    return number if math.isfinite(number) else 0


def _corners(box: Float64[np.ndarray, " 4"], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last pixel that a box covers within the image: what lies beyond is drawn at the border."""
    height, width = image_size
    x0, y0, x1, y1 = np.nan_to_num(box).clip(0, [width, height] * 2)
    left, top = min(round(x0), width - 1), min(round(y0), height - 1)
    return left, top, max(left, round(x1) - 1), max(top, round(y1) - 1)


def _outline(
    canvas: ImageDraw.ImageDraw,
    box: Float64[np.ndarray, " 4"],
    color: tuple[int, int, int],
    line_width: int,
    image_size: tuple[int, int],
) -> None:
    """The box in its colour, within a thin dark line that sets it off from a ground of the same colour."""
    left, top, right, bottom = _corners(box, image_size)
    canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0))
    canvas.rectangle((left, top, right, bottom), outline=color, width=line_width)


def _place(
    canvas: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    box: Float64[np.ndarray, " 4"],
    taken: list[tuple[int, int, int, int]],
    line_width: int,
    image_size: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Where a label goes, in the image: above its box, or else inside it or below, where it covers others the least."""
    height, width = image_size
    left, top, right, bottom = _corners(box, image_size)
    _, _, text_width, _ = canvas.textbbox((0, 0), text, font=font)
    _, _, _, text_height = canvas.textbbox((0, 0), "Ag", font=font)  # one height for all labels
    label_width, label_height = math.ceil(text_width) + 2 * _PADDING, math.ceil(text_height) + 2 * _PADDING
    candidates = []
    for x in (left, right + 1 - label_width):
        for y in (top - label_height, top + line_width, bottom + 1, bottom + 1 - line_width - label_height):
            x_inside = max(0, min(x, width - label_width))
            y_inside = max(0, min(y, height - label_height))
            place = x_inside, y_inside, x_inside + label_width, y_inside + label_height
            candidates.append((sum(_overlap(place, other) for other in taken), (x, y) != (x_inside, y_inside), place))
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _label(
    canvas: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    place: tuple[int, int, int, int],
    color: tuple[int, int, int],
) -> None:
    """Text on a ground of the class's colour, black or white as that can be read."""
    left, top, right, bottom = place
    canvas.rectangle((left, top, right - 1, bottom - 1), fill=color)
    ink = (0, 0, 0) if _luminance(color) > 128 else (255, 255, 255)
    canvas.text((left + _PADDING, top + _PADDING), text, font=font, fill=ink)
