"""Traces the outlines of a mask as polygons."""

import numpy as np
from jaxtyping import Bool, Float64


def trace_outlines(mask: Bool[np.ndarray, "h w"]) -> tuple[list[Float64[np.ndarray, "p 2"]], bool]:
    """Traces the connected components of a mask. Returns polygons through pixel corners, and whether there is a hole.

    Components are 4-connected: pixels that touch only at a corner belong to different ones. The outlines of holes are
    not returned, since COCO's polygons cannot have holes. Without holes, the polygons cover the mask exactly.

    >>> outlines, has_hole = trace_outlines(np.array([[False, True, True]]))
    >>> outlines[0].tolist(), has_hole
    ([[1.0, 0.0], [3.0, 0.0], [3.0, 1.0], [1.0, 1.0]], False)
    """
    # Walk along the cracks between pixels with the mask on the right: clockwise around a component, as y points down.
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    cracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (dy, dx), (ay, ax), (by, bx) in (
        ((-1, 0), (0, 0), (0, 1)),  # top edge, rightwards
        ((0, 1), (0, 1), (1, 1)),  # right edge, downwards
        ((1, 0), (1, 1), (1, 0)),  # bottom edge, leftwards
        ((0, -1), (1, 0), (0, 0)),  # left edge, upwards
    ):
        outside = ~padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(inner & outside).tolist():
            cracks.setdefault((x + ax, y + ay), []).append((x + bx, y + by))
    outlines, has_hole = [], False
    while cracks:
        start = at = next(iter(cracks))
        heading, corners = (0, 0), []
        while True:
            ends = cracks[at]
            # At a corner where two components touch, the right turn stays with the current component.
            end = ends[0] if len(ends) == 1 else max(ends, key=lambda end, h=heading, at=at: _turn(h, at, end))
            ends.remove(end)
            if not ends:
                del cracks[at]
            step = end[0] - at[0], end[1] - at[1]
            if step != heading:
                corners.append(at)
            heading, at = step, end
            if at == start:
                break
        outline = np.array(corners, np.float64)
        if signed_area(outline) < 0:
            has_hole = True
        else:
            outlines.append(outline)
    return outlines, has_hole


def signed_area(points: Float64[np.ndarray, "p 2"]) -> float:
    """Returns the area of a polygon, negative if its points run counter-clockwise with y pointing down.

    >>> signed_area(np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]]))
    2.0
    """
    x, y = points.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def _turn(heading: tuple[int, int], at: tuple[int, int], end: tuple[int, int]) -> int:
    """Returns 1 for a right turn and -1 for a left turn, with y pointing down."""
    return heading[0] * (end[1] - at[1]) - heading[1] * (end[0] - at[0])
