"""Box formats of annotation files: conversion to COCO's, and detection of a wrong one."""

from typing import Any, Literal, get_args, no_type_check

import numpy as np
from jaxtyping import Bool, Float64

from ._report import Collector


# COCO's own format, in pixels, and those that other tools write into "bbox". The normalised ones hold fractions of the
# image's width and height.
BoxFormat = Literal["xywh", "xyxy", "cxcywh", "normalized_xywh", "normalized_xyxy", "normalized_cxcywh"]
LAYOUTS = {"xywh": "[x, y, width, height]", "xyxy": "[x0, y0, x1, y1]", "cxcywh": "[center x, center y, width, height]"}
NORMALIZED = "normalized_"
# Larger numbers are not converted.
LARGEST = 1e18

# A box is plausible under a format if it extends beyond its image by at most this fraction of the image's side, and has
# a side longer than one pixel.
SLACK = 0.02
# A format is rejected if at least this fraction of the boxes, and at least this many of them, are implausible under it:
# fewer may be individual mistakes.
MISFITS = 0.1
FEWEST_MISFITS = 5
# It is rejected only if at least this fraction of the boxes is plausible under another format. Individual mistakes
# extend beyond any side of an image, a wrong format always beyond the same side.
FITTING = 0.95


@no_type_check
def to_corners(
    box: list[float], box_format: BoxFormat, width: float, height: float
) -> tuple[float, float, float, float]:
    """Converts a box in an image of this size to `(x0, y0, x1, y1)` in pixels. All numbers may be arrays.

    >>> to_corners([0.5, 0.5, 0.2, 0.4], "normalized_cxcywh", 100, 10)
    (40.0, 3.0, 60.0, 7.0)
    """
    a, b, c, d = box
    if box_format.startswith(NORMALIZED):
        a, b, c, d = a * width, b * height, c * width, d * height
    layout = box_format.removeprefix(NORMALIZED)
    if layout == "xyxy":
        return a, b, c, d
    if layout == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return a, b, a + c, b + d


@no_type_check
def to_coco(entry: dict[str, Any], box_format: BoxFormat, width: int, height: int) -> dict[str, Any]:
    """Converts an annotation's box to COCO's format and, for a normalised format, everything else to pixels.

    Values that are not numbers are left unchanged; the checks of each field reject them later.

    >>> to_coco({"bbox": [0.1, 0.5, 0.3, 0.75], "area": 0.05}, "normalized_xyxy", 100, 40)
    {'bbox': [10.0, 20.0, 20.0, 10.0], 'area': 200.0}
    """
    changed, bbox = dict(entry), entry["bbox"]
    if isinstance(bbox, list) and len(bbox) == 4 and _are_numbers(bbox):
        x0, y0, x1, y1 = to_corners(bbox, box_format, width, height)
        changed["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    if box_format.startswith(NORMALIZED):
        if _are_numbers([entry.get("area")]):
            changed["area"] = entry["area"] * width * height
        if isinstance(entry.get("segmentation"), list):
            changed["segmentation"] = [_scale(polygon, (width, height)) for polygon in entry["segmentation"]]
        if "keypoints" in entry:
            changed["keypoints"] = _scale(entry["keypoints"], (width, height, 1))
    return changed


@no_type_check
def _scale(numbers: Any, factors: tuple[int, ...]) -> Any:
    """Multiplies a list of numbers by the factors in turn. Anything else is left unchanged."""
    if not isinstance(numbers, list) or not _are_numbers(numbers):
        return numbers
    return [number * factors[position % len(factors)] for position, number in enumerate(numbers)]


def _are_numbers(values: list) -> bool:
    """Whether all values are numbers of a usable size: an integer in JSON may be too large for a float."""
    return all(type(value) in (int, float) and -LARGEST < value < LARGEST for value in values)


def check_box_format(
    boxes: Float64[np.ndarray, "n 4"],
    image_sizes: Float64[np.ndarray, "n 2"],
    box_format: BoxFormat,
    problems: Collector,
) -> None:
    """Records an error if the boxes of a file appear to be in a format other than `box_format`.

    This is the case if at least a tenth of the boxes, and at least five, are implausible under `box_format` (outside
    their image, without an area, or no larger than a pixel), while nearly all are plausible under another format. Fewer
    implausible boxes may be individual mistakes: they are clipped or dropped, and counted.

    - `image_sizes`: `(height, width)` of the image of each box.
    """
    misfits = int((~_fit(boxes, image_sizes, box_format)).sum())
    total = len(boxes)
    if misfits < max(FEWEST_MISFITS, MISFITS * total):
        return
    counts = {other: int(_fit(boxes, image_sizes, other).sum()) for other in get_args(BoxFormat)}
    likely = [other for other, count in counts.items() if count >= FITTING * total]
    if not likely:
        return
    best = max(counts[other] for other in likely)
    read, seen = _describe(box_format), " or ".join(_describe(other) for other in likely)
    names = " or ".join(f'"{other}"' for other in likely)
    problems.error(
        "boxes in another format",
        f'{misfits:,} of {total:,} are not a valid "bbox" as {read}, but {best:,} are valid as {seen}.',
        f"Pass box_format={names} (--box-format on the command line), or convert them.",
    )


def _fit(
    boxes: Float64[np.ndarray, "n 4"], image_sizes: Float64[np.ndarray, "n 2"], box_format: BoxFormat
) -> Bool[np.ndarray, " n"]:
    """Which boxes are plausible under a format: within their image, and with an area."""
    height, width = image_sizes.T  # (n,) each
    x0, y0, x1, y1 = to_corners(boxes.T, box_format, width, height)
    inside = (x0 >= -SLACK * width) & (y0 >= -SLACK * height)
    inside &= (x1 <= (1 + SLACK) * width) & (y1 <= (1 + SLACK) * height)
    return inside & (x1 > x0) & (y1 > y0) & (np.maximum(x1 - x0, y1 - y0) > 1)


def _describe(box_format: BoxFormat) -> str:
    fractions = box_format.startswith(NORMALIZED)
    return LAYOUTS[box_format.removeprefix(NORMALIZED)] + (" in fractions of the image" if fractions else " in pixels")
