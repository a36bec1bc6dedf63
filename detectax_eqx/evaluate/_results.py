"""Converts detections to COCO's results format, in pixels of the original images."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from pycocotools import mask as rle

from .._types import Detections, Images
from ..files import whole_file
from ..ops import paste_masks
from ._checks import check_fields, check_masks


# Masks are pasted in chunks of this size, or smaller on a large canvas: one program per canvas, with bounded memory.
_CHUNK, _CHUNK_PIXELS = 16, 2**24
# If the original image is larger than the batch's canvas, its size is rounded up to a multiple of this, so that a few
# programs serve many sizes.
_CANVAS_STEP = 256


def to_coco_results(
    detections: Detections,
    images: Images,
    *,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    mask_threshold: float = 0.5,
    paste: Callable[..., Bool[Array, "n h w"]] = paste_masks,
) -> list[dict[str, Any]]:
    """Converts the detections of a batch to COCO's results format, for `evaluate_coco`, pycocotools' `loadRes` or JSON.

    - `detections`: with the same batch axis as `images`, and boxes in pixels of `images`. Images and rows that are not
      valid are skipped.
    - `image_ids`: the id of every image of the dataset, by its position in the dataset (`images.indices`).
    - `category_ids`: the category id of every label.
    - `mask_threshold`: a pixel belongs to a mask if its probability is above this. Masks are pasted into their boxes
      by `paste` at the resolution of the original image and encoded as compressed run lengths.
    - `paste`: `ops.paste_masks` or a function with its arguments, such as a model's `paste`.

    Returns results in the order of the detections. Each has `image_id`, `category_id`, `bbox` (x, y, width, height),
    `score`, `segmentation` if there are masks, and `keypoints` (x, y and score of each point in one list) if there are
    any. Boxes, masks and keypoints are scaled to `images.original_sizes`.

    Raises a `ValueError` if a label has no category id, or an image index has no image id.

    >>> pixels, sizes, ones = np.zeros((1, 64, 96, 3), np.uint8), np.array([[60, 80]], np.int32), np.ones(1, np.int32)
    >>> images = Images(pixels, sizes, 2 * sizes, ones, ones > 0, canvas=(64, 96))
    >>> boxes, scores = np.array([[[10, 20, 30, 30]]], np.float32), np.array([[0.5]], np.float32)
    >>> detections = Detections(boxes, scores, ones[None], ones[None] > 0)
    >>> to_coco_results(detections, images, image_ids=[139, 285], category_ids=[1, 17])
    [{'image_id': 285, 'category_id': 17, 'bbox': [20.0, 40.0, 40.0, 20.0], 'score': 0.5}]
    """
    boxes, sizes = np.asarray(detections.boxes, np.float64), np.asarray(images.sizes)
    if boxes.ndim != 3 or sizes.ndim != 2 or len(boxes) != len(sizes):
        raise ValueError(
            f"detections and images must have one batch axis of the same length, got boxes {boxes.shape} "
            f"and sizes {sizes.shape}."
        )
    scores, labels = np.asarray(detections.scores), np.asarray(detections.labels)
    masks = None if detections.masks is None else np.asarray(detections.masks)
    originals, indices = np.asarray(images.original_sizes), np.asarray(images.indices)
    source = images.pixels.shape[-3], images.pixels.shape[-2]
    ratios = originals / sizes.clip(1)  # (b, 2)
    scale = ratios[:, None, [1, 0, 1, 0]]
    boxes, frames = boxes * scale, np.asarray(detections.frames, np.float64) * scale  # (b, n, 4) * (b, 1, 4)
    keypoints = None
    if detections.keypoints is not None:
        factors = np.insert(ratios[:, ::-1], 2, 1, axis=1)  # (b, 3): x, y, and 1 for the score
        keypoints = np.asarray(detections.keypoints, np.float64) * factors[:, None, None]  # (b, n, k, 3)
    results, entries_by_canvas = [], {}
    for i, row in np.argwhere(np.asarray(detections.valid) & np.asarray(images.valid)[:, None]):
        label, index = int(labels[i, row]), int(indices[i])
        if not 0 <= label < len(category_ids):
            raise ValueError(f"Label {label} has no category id: category_ids has {len(category_ids)}.")
        if not 0 <= index < len(image_ids):
            raise ValueError(f"Image {index} of the dataset has no image id: image_ids has {len(image_ids)}.")
        x0, y0, x1, y1 = boxes[i, row].tolist()
        result = {
            "image_id": int(image_ids[index]),
            "category_id": int(category_ids[label]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(scores[i, row]),
        }
        if keypoints is not None:
            result["keypoints"] = keypoints[i, row].ravel().tolist()
        if masks is not None:
            entries_by_canvas.setdefault(_canvas(originals[i], source), []).append((result, i, row))
        results.append(result)
    for canvas, entries in entries_by_canvas.items():
        assert masks is not None
        where = tuple(np.array([(i, row) for _, i, row in entries]).T)
        for (result, i, _), mask in zip(
            entries, _paste(masks[where], frames[where], canvas, mask_threshold, paste), strict=True
        ):
            height, width = originals[i]
            result["segmentation"] = encode_mask(mask[:height, :width])
    return results


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """Encodes a mask as COCO's compressed run lengths, as a string instead of bytes, for JSON.

    >>> encode_mask(np.array([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': '22'}
    """
    encoded: dict[str, Any] = dict(rle.encode(np.asfortranarray(mask, np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def write_results(results: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes results to a JSON file atomically: a temporary file is written and then renamed.

    Raises a `ValueError` for a number that is not finite, which JSON cannot represent.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_results([{"image_id": 1, "score": 0.5}], f"{folder}/detections.json")
    ...     Path(f"{folder}/detections.json").read_text()
    '[{"image_id": 1, "score": 0.5}]'
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(list(results), file, allow_nan=False)


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads results from a JSON file and checks them as far as possible without the annotations.

    Raises a `ValueError` that names the file if it is not JSON or not a list of objects. The error also names position,
    image and value of the first result that has a missing `image_id`, `category_id` or `score`, a field of a wrong
    type, a number that is not finite, a box of negative size, a malformed mask, or run lengths that do not add up to
    the mask's size.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_results([{"image_id": 1, "category_id": 7, "score": 0.5}], f"{folder}/detections.json")
    ...     read_results(f"{folder}/detections.json")
    [{'image_id': 1, 'category_id': 7, 'score': 0.5}]
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{path} is not in COCO's results format, a list of objects.")
    try:
        check_fields(results)
        check_masks(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return results


def _canvas(original: Int32[np.ndarray, " 2"], source: tuple[int, int]) -> tuple[int, int]:
    """Returns the canvas size for pasting an image's masks: that of its batch, unless the original image is larger."""
    height, width = (int(side) for side in original)
    if height <= source[0] and width <= source[1]:
        return source
    return -(-height // _CANVAS_STEP) * _CANVAS_STEP, -(-width // _CANVAS_STEP) * _CANVAS_STEP


def _paste(
    masks: Float[np.ndarray, "n s t"],
    boxes: Float[np.ndarray, "n 4"],
    canvas: tuple[int, int],
    threshold: float,
    paste: Callable[..., Bool[Array, "n h w"]],
) -> Iterator[Bool[np.ndarray, "h w"]]:
    """Yields the masks pasted onto the canvas one by one, computed in chunks of equal shape."""
    size = min(_CHUNK, max(1, _CHUNK_PIXELS // (canvas[0] * canvas[1])))
    for start in range(0, len(masks), size):
        chunk = slice(start, start + size)
        count = len(masks[chunk])
        padding = ((0, size - count), (0, 0), (0, 0))
        pasted = _paste_chunk(
            np.pad(masks[chunk].astype(np.float32), padding),
            np.pad(boxes[chunk].astype(np.float32), padding[:2]),
            threshold,
            canvas=canvas,
            paste=paste,
        )
        yield from np.asarray(pasted)[:count]


@partial(jax.jit, static_argnames=("canvas", "paste"))
def _paste_chunk(
    masks: Float[Array, "n s t"],
    boxes: Float[Array, "n 4"],
    threshold: float | Float[Array, ""],
    *,
    canvas: tuple[int, int],
    paste: Callable[..., Bool[Array, "n h w"]],
) -> Bool[Array, "n h w"]:
    return paste(masks, boxes, image_size=canvas, threshold=threshold)
