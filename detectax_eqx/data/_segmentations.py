"""Checks and encodes single segmentations, independently of an annotation file."""

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from ._dataset import ImageRecord, Segmentation
from ._report import Collector
from ._validate import check_segmentation


def parse_segmentation(value: Any, image_size: tuple[int, int]) -> Segmentation:
    """Parses a segmentation in any of COCO's formats and checks it by the rules of `load_coco`.

    - `value`: polygons `[[x1, y1, x2, y2, …], …]`, or run lengths, compressed (text or bytes) or as a list. `None` and
      `[]` mean none.
    - `image_size`: `(height, width)`. Run lengths must state this size and add up to it.

    Raises a `ValueError` that describes the problem and its remedy.

    >>> parse_segmentation({"size": [2, 3], "counts": [1, 3, 2]}, (2, 3))
    {'size': [2, 3], 'counts': b'132'}
    """
    if isinstance(value, dict) and isinstance(value.get("counts"), bytes):
        value = {**value, "counts": value["counts"].decode("latin-1")}
    problems = Collector(Path("segmentation"))
    segmentation, _ = check_segmentation(_lists(value), ImageRecord(0, Path(), *image_size), problems, {})
    for problem in problems.errors:
        raise ValueError(f"{problem.kind}: {problem.what} {problem.remedy}")
    return segmentation


def encode_segmentation(segmentation: Segmentation, image_size: tuple[int, int]) -> dict[str, Any]:
    """Encodes polygons or run lengths of an image of size `(height, width)` as compressed run lengths.

    Raises a `ValueError` if there is no segmentation.

    >>> square = np.array([[1.0, 0.0], [3.0, 0.0], [3.0, 2.0], [1.0, 2.0]])
    >>> encode_segmentation((square,), (2, 4))
    {'size': [2, 4], 'counts': b'242'}
    """
    if segmentation is None:
        raise ValueError("segmentation is None: the object has a box only.")
    if isinstance(segmentation, dict):
        return segmentation
    polygons: Any = [polygon.ravel().tolist() for polygon in segmentation]
    encoded: Any = rle.merge(rle.frPyObjects(polygons, *image_size))
    return dict(encoded)


def _lists(value: Any) -> Any:
    """Converts tuples and arrays to lists, as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value] if not all(type(item) in (int, float) for item in value) else [*value]
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return value
