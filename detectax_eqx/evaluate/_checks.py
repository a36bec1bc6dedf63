"""Checks detection results before they reach pycocotools' C code.

There may be a million results. Functions that are called for each of them are excluded from the package's runtime type
checking.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import numpy as np
from jaxtyping import Float64, Int64
from pycocotools import mask as rle

from ..data import CocoDataset, decode_counts, encode_segmentation, parse_segmentation


# What is compared: boxes or masks by IoU, keypoints by OKS.
IoUType = Literal["bbox", "segm", "keypoints"]
# Larger coordinates cannot be measurements in pixels.
LARGEST = 1e9
# Compressed run lengths are checked this many masks at a time.
CHUNK = 10_000
# The image size with which polygons in a results file are checked, without the annotations. Only run lengths need the
# actual size.
ANY_SIZE = 1, 1


@dataclass(frozen=True)
class CheckedResults:
    """`n` valid results.

    - `images`, `labels`: positions in the dataset's images and categories.
    - `boxes_xywh`: NaN where a result has no box. `masks`: compressed run lengths in pycocotools' format, or `None`.
    - `keypoints`: `(x, y, score)` of each of the `k` points of the dataset, or `None` if they are not evaluated.
    """

    images: Int64[np.ndarray, " n"]
    labels: Int64[np.ndarray, " n"]
    scores: Float64[np.ndarray, " n"]
    boxes_xywh: Float64[np.ndarray, "n 4"]
    masks: list[dict[str, Any] | None]
    keypoints: Float64[np.ndarray, "n k 3"] | None = None


def check_results(results: Sequence[Any], dataset: CocoDataset, *, iou_type: IoUType) -> CheckedResults:
    """Checks results and converts them to columns. Boxes and masks are both checked, even if `iou_type` needs only one.

    Raises a `ValueError` that names the first invalid result, its image and the value.
    """
    check_fields(results)
    index_of = {image.id: index for index, image in enumerate(dataset.images)}
    label_of = {id: label for label, id in enumerate(dataset.category_ids)}
    known_images = lambda id: id in index_of  # noqa: E731
    known_categories = lambda id: id in label_of  # noqa: E731
    _require(results, "image_id", known_images, "is on image {value}: the annotations have no image {value}.")
    _require(results, "category_id", known_categories, "has category {value}, which the annotations do not have.")
    if iou_type == "bbox":
        _require(results, "bbox", _is_there, "has no bbox of four numbers: {value}.")
    elif iou_type == "segm":
        _require(results, "segmentation", _is_there, "has no segmentation. Evaluate boxes instead, or remove it.")
    else:
        length = 3 * dataset.num_keypoints
        right = lambda value: value is not None and len(value) == length  # noqa: E731
        _require(results, "keypoints", right, f"has no keypoints of {length} numbers: {{value}}.")
    images = [index_of[result["image_id"]] for result in results]
    boxes = [result["bbox"] if result.get("bbox") is not None else (np.nan,) * 4 for result in results]
    sizes = dataset.sizes
    return CheckedResults(
        np.array(images, np.int64),
        np.array([label_of[result["category_id"]] for result in results], np.int64),
        np.array([float(result["score"]) for result in results], np.float64),
        np.array(boxes, np.float64).reshape(-1, 4),
        _masks(results, [sizes[index] for index in images]),
        None if iou_type != "keypoints" else _points(results, dataset.num_keypoints),
    )


def check_fields(results: Sequence[Any]) -> None:
    """Checks that every result has the fields of COCO's results format, with the right types, without a dataset.

    Raises a `ValueError` that names the first invalid result, its image and the value.
    """
    for position, result in enumerate(results):
        if not isinstance(result, Mapping):
            raise ValueError(f"results[{position}] is {_show(result)}. Make it an object.")
    _require(results, "image_id", _is_id, "has the image_id {value}. Make it an integer.")
    _require(results, "category_id", _is_id, "has the category_id {value}. Make it an integer.")
    _require(results, "score", _is_score, "has a score of {value}. Make it a finite number.")
    _require(results, "bbox", _is_four, "has no bbox of four numbers: {value}.")
    words = "has the bbox {value}. Numbers must be finite, width and height not negative."
    _require(results, "bbox", _is_box, words)
    words = "has the keypoints {value}. Make them one list of finite numbers: x, y and score of each point."
    _require(results, "keypoints", _are_points, words)


def check_masks(results: Sequence[Any]) -> None:
    """Checks that masks are well-formed and that run lengths add up to the size that they state.

    Raises a `ValueError` as `check_fields` does.
    """
    sizes = []
    for position, result in enumerate(results):
        value = result.get("segmentation")
        size = value.get("size") if isinstance(value, Mapping) else ANY_SIZE
        if not (isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_side, size))):
            raise ValueError(f"{_where(results, position)} has a mask of size {_show(size)}. Make it [height, width].")
        sizes.append((size[0], size[1]))
    _masks(results, sizes)


@no_type_check
def _masks(results: Sequence[Any], sizes: list[tuple[int, int]]) -> list[dict[str, Any] | None]:
    """Checks the masks of all results, for images of these sizes, and encodes them as compressed run lengths."""
    masks, compressed = [], []
    for position, (result, size) in enumerate(zip(results, sizes, strict=True)):
        value = result.get("segmentation")
        counts = value.get("counts") if isinstance(value, Mapping) else None
        if counts and isinstance(counts, str | bytes):
            _check_size(results, position, value.get("size"), size)
            text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
            masks.append({"size": [*size], "counts": text})
            compressed.append(position)
            continue
        try:
            segmentation = parse_segmentation(value, size)
            masks.append(None if segmentation is None else encode_segmentation(segmentation, size))
        except ValueError as error:
            if isinstance(value, Mapping):
                _check_size(results, position, value.get("size"), size)
            raise ValueError(f"{_where(results, position)} has a {error}") from None
    for start in range(0, len(compressed), CHUNK):
        _check_sums(results, compressed[start : start + CHUNK], masks)
    return masks


@no_type_check
def _points(results: Sequence[Any], count: int) -> Float64[np.ndarray, "n k 3"]:
    return np.array([result["keypoints"] for result in results], np.float64).reshape(len(results), count, 3)


@no_type_check
def _check_size(results: Sequence[Any], position: int, got: Any, size: tuple[int, int]) -> None:
    if not isinstance(got, list | tuple) or [*got] != [*size]:
        where = _where(results, position)
        raise ValueError(f"{where} has a mask of size {_show(got)}, but its image is {[*size]}.")


@no_type_check
def _check_sums(results: Sequence[Any], rows: list[int], masks: list[dict[str, Any]]) -> None:
    """Checks that compressed run lengths can be decoded and add up to the number of pixels of their masks."""
    try:
        runs, counts = decode_counts([masks[row]["counts"] for row in rows])
    except ValueError:
        for row in rows:  # find the malformed one
            try:
                decode_counts([masks[row]["counts"]])
            except ValueError as error:
                text = _show(masks[row]["counts"])
                raise ValueError(f"{_where(results, row)} has a malformed mask: {error}: {text}.") from None
        raise
    starts = np.cumsum(counts) - counts
    sums, least = np.add.reduceat(runs, starts), np.minimum.reduceat(runs, starts)
    pixels = np.array([masks[row]["size"][0] * masks[row]["size"][1] for row in rows])
    for k in np.flatnonzero((sums != pixels) | (least < 0)).tolist():
        height, width = masks[rows[k]]["size"]
        what = f"run lengths that add up to {sums[k]}, not to {height}·{width} = {pixels[k]}"
        what = what if least[k] >= 0 else f"a negative run length, {least[k]}"
        raise ValueError(f"{_where(results, rows[k])} has a malformed mask: {what}. Encode the mask again.")


@no_type_check
def _require(results: Sequence[Any], field: str, check: Callable[[Any], bool], words: str) -> None:
    """Raises a `ValueError` with the message `words` for the first result whose field fails the check."""
    for position, result in enumerate(results):
        value = result.get(field)
        if not check(value):
            raise ValueError(f"{_where(results, position)} {words.format(value=_show(value))}")


@no_type_check
def _where(results: Sequence[Any], position: int) -> str:
    return f"results[{position}] on image {_show(results[position].get('image_id'))}"


@no_type_check
def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, list | tuple) and not value)


@no_type_check
def _is_id(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer) or (type(value) is float and value.is_integer())


@no_type_check
def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


@no_type_check
def _is_number(value: Any) -> bool:
    kind = type(value)
    if kind is float or kind is int or isinstance(value, np.integer | np.floating):
        return True
    return _is_array(value, ())


@no_type_check
def _is_array(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is a NumPy or JAX array of numbers with this shape."""
    return getattr(value, "shape", None) == shape and np.asarray(value).dtype.kind not in "bOSU"


@no_type_check
def _is_score(value: Any) -> bool:
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


@no_type_check
def _is_four(value: Any) -> bool:
    """Whether a value is four numbers or `None`."""
    if value is None:
        return True
    if not isinstance(value, list | tuple):
        return _is_array(value, (4,))
    return len(value) == 4 and all(map(_is_number, value))


@no_type_check
def _is_box(value: Any) -> bool:
    if value is None:
        return True
    try:
        x, y, width, height = map(float, value)
    except OverflowError:
        return False
    # NaN fails these comparisons.
    return -LARGEST < x < LARGEST and -LARGEST < y < LARGEST and 0 <= width < LARGEST and 0 <= height < LARGEST


@no_type_check
def _are_points(value: Any) -> bool:
    """Whether a value is a list of finite numbers, three for each point, or `None`."""
    if value is None:
        return True
    if not isinstance(value, list | tuple) or len(value) % 3 or not value:
        return False
    try:
        return all(_is_number(number) and -LARGEST < number < LARGEST for number in value)
    except OverflowError:
        return False


def _show(value: object) -> str:
    text = " ".join(repr(value).split())  # the repr of an array has line breaks
    return text if len(text) <= 60 else text[:57] + "…"


def mask_areas(masks: Sequence[dict[str, Any]]) -> Float64[np.ndarray, " n"]:
    """Returns the area of each mask in pixels."""
    area: Any = rle.area  # fails for more than 255 masks at once
    return np.array([float(area(mask)) for mask in masks], np.float64)
