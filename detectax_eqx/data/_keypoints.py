"""Checks and parses the keypoints of a COCO-format file: those that a category names, and those of an annotation."""

from typing import Any, no_type_check

import numpy as np

from ._dataset import ImageRecord
from ._report import Collector
from ._values import are_numbers, is_int, show


# COCO's visibilities: not labelled, labelled but hidden, visible.
VISIBILITIES = (0, 1, 2)


def parse_names(
    entry: dict[str, Any], position: int, problems: Collector
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Returns the names of a category's points, and its bones as pairs of positions from 0; the file counts from 1.

    `position`: of the category in the file.
    """
    names = [] if entry.get("keypoints") is None else entry["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        what = f'"keypoints" of categories[{position}] is {show(names)}.'
        problems.error("wrong keypoint names", what, "Make it a list of different strings, one per point.")
        return (), ()
    bones = [] if entry.get("skeleton") is None else entry["skeleton"]
    if not isinstance(bones, list) or not all(_is_bone(bone, len(names)) for bone in bones):
        what = f'"skeleton" of categories[{position}] is {show(bones)}.'
        remedy = f"Make it a list of pairs of positions in its {len(names)} keypoints, from 1."
        problems.error("wrong skeleton", what, remedy)
        return tuple(names), ()
    return tuple(names), tuple((start - 1, end - 1) for start, end in bones)


def _is_bone(bone: Any, count: int) -> bool:
    return isinstance(bone, list) and len(bone) == 2 and all(is_int(end) and 1 <= end <= count for end in bone)


@no_type_check
def parse_keypoints(
    entry: dict[str, Any], count: int, image: ImageRecord, problems: Collector, where: dict[str, Any]
) -> tuple[np.ndarray, bool]:
    """Returns the `(count, 3)` keypoints of an annotation whose category names `count`; and whether they are valid.

    An annotation without keypoints has none that is labelled.
    """
    value, nothing = entry.get("keypoints"), np.zeros((count, 3))
    if value is None or value == []:
        return nothing, True
    if not count:
        remedy = 'They are ignored. To use them, list their names as "keypoints" of the category.'
        problems.note("keypoints that the category does not name", f"{show(value)}.", remedy, **where)
        return nothing, True
    if not isinstance(value, list) or len(value) != 3 * count or not are_numbers(value):
        remedy = f"Make it x, y and visibility of each of the {count} points: {3 * count} finite numbers in one list."
        problems.error("wrong keypoints", f'"keypoints" is {show(value)}.', remedy, **where)
        return nothing, False
    if not set(value[2::3]) <= {*VISIBILITIES}:
        what = f"the visibilities are {show(value[2::3])}."
        problems.error("wrong visibility", what, "Make each 0 (not labelled), 1 (hidden) or 2 (visible).", **where)
        return nothing, False
    points = np.array(value, np.float64).reshape(count, 3)
    x, y, _ = points[points[:, 2] > 0].T  # (labelled,) each
    stated = entry.get("num_keypoints")
    if stated is not None and stated != len(x):
        what = f'"num_keypoints" is {show(stated)}, but {len(x)} points are labelled.'
        problems.repair("wrong num_keypoints", what, "Counted again.", **where)
    outside = int(((x < 0) | (y < 0) | (x > image.width) | (y > image.height)).sum())
    if outside:
        what = f"{outside} of its {len(x)} points lie outside its {image.width}×{image.height} image."
        problems.note("keypoints outside the image", what, "They are kept.", **where)
    return points, True
