"""Draws keypoints and the bones between them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from PIL import ImageDraw


# The bones of each class, as pairs of positions in its keypoints.
Skeletons = Sequence[Sequence[tuple[int, int]]]
# Points farther from the image than this, in image sides, are not drawn, since Pillow's coordinates are 32 bits.
FARTHEST = 10
# What the third column of points means.
ABSENT, HIDDEN, SHOWN = 0, 1, 2


def draw_keypoints(
    canvas: ImageDraw.ImageDraw,
    points: Float64[np.ndarray, "k 3"],
    bones: Sequence[tuple[int, int]],
    color: tuple[int, int, int],
    line_width: int,
    image_size: tuple[int, int],
) -> None:
    """Draws the points of one object, `(x, y, state)`: bones as lines, shown points as discs, hidden ones as rings.

    Bones with an absent end, and points that are not finite or far outside the image, are left out.
    """
    reach = FARTHEST * max(image_size)
    there = (points[:, 2] != ABSENT) & (np.abs(points[:, :2]) < reach).all(axis=1)  # false for NaN
    places = [(float(x), float(y)) for x, y, _ in points]
    for start, end in bones:
        if max(start, end) < len(points) and there[start] and there[end]:
            canvas.line([places[start], places[end]], fill=color, width=line_width)
    radius = line_width + 1
    for k in np.flatnonzero(there):
        x, y = places[k]
        disc = (x - radius, y - radius, x + radius, y + radius)
        canvas.ellipse(
            disc, fill=color if points[k, 2] == SHOWN else None, outline=color, width=max(1, line_width // 2)
        )
