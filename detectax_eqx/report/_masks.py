"""Masks at thumbnail size."""

from typing import Any

import numpy as np
from PIL import Image

from .. import data, evaluate


# The maximum length of a mask's longest side, in pixels.
LONGEST = 240


def mask_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """The `(height, width)` at which the masks of an image of size `(height, width)` are stored."""
    scale = min(1.0, LONGEST / max(image_size))
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def shrink_mask(segmentation: Any, image_size: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Resizes a segmentation (polygons or run lengths) to `(height, width)`, as compressed run lengths.

    Returns `None` if there is no segmentation.
    """
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        pixels = Image.fromarray(data.decode_rle(segmentation) * 255).resize((size[1], size[0]), Image.Resampling.BOX)
        return evaluate.encode_mask(np.asarray(pixels) > 127)["counts"]
    scale = np.array([size[1] / image_size[1], size[0] / image_size[0]])
    polygons = tuple(points * scale for points in segmentation)
    return data.encode_segmentation(polygons, size)["counts"].decode("ascii")
