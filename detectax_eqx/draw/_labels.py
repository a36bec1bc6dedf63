"""Draws box outlines, and labels that avoid each other."""

import math

import numpy as np
from jaxtyping import Float64
from PIL import ImageDraw

from ._color import luminance
from ._fonts import Face, measure, write


_PADDING = 2  # pixels between a label's text and the edge of its background


def corners(box: Float64[np.ndarray, " 4"], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the first and last pixel that a box covers in the image. Sides outside the image move to its border."""
    height, width = image_size
    x0, y0, x1, y1 = np.nan_to_num(box).clip(0, [width, height] * 2)
    left, top = min(round(x0), width - 1), min(round(y0), height - 1)
    return left, top, max(left, round(x1) - 1), max(top, round(y1) - 1)


def outline(
    canvas: ImageDraw.ImageDraw,
    box: Float64[np.ndarray, " 4"],
    color: tuple[int, int, int],
    line_width: int,
    image_size: tuple[int, int],
) -> None:
    """Draws a box in its colour, with a thin black line around it for contrast with a background of the same colour."""
    left, top, right, bottom = corners(box, image_size)
    canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0))
    canvas.rectangle((left, top, right, bottom), outline=color, width=line_width)


def place(
    text: str,
    face: Face,
    box: Float64[np.ndarray, " 4"],
    taken: list[tuple[int, int, int, int]],
    line_width: int,
    image_size: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Returns the position of a label: above its box, inside it or below, where it overlaps other labels least."""
    height, width = image_size
    left, top, right, bottom = corners(box, image_size)
    text_width, above, below = measure(text, face)
    label_width, label_height = math.ceil(text_width) + 2 * _PADDING, above + below + 2 * _PADDING
    candidates = []
    for x in (left, right + 1 - label_width):
        for y in (top - label_height, top + line_width, bottom + 1, bottom + 1 - line_width - label_height):
            x_inside = max(0, min(x, width - label_width))
            y_inside = max(0, min(y, height - label_height))
            spot = x_inside, y_inside, x_inside + label_width, y_inside + label_height
            candidates.append((sum(_overlap(spot, other) for other in taken), (x, y) != (x_inside, y_inside), spot))
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Returns the area of the intersection of two rectangles, in pixels."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def label(
    canvas: ImageDraw.ImageDraw,
    text: str,
    face: Face,
    place: tuple[int, int, int, int],
    color: tuple[int, int, int],
) -> None:
    """Draws text on a background of the class colour, in black or white for contrast."""
    left, top, right, bottom = place
    canvas.rectangle((left, top, right - 1, bottom - 1), fill=color)
    ink = (0, 0, 0) if luminance(color) > 128 else (255, 255, 255)
    write(canvas, (left + _PADDING, top + _PADDING), text, face, ink)
