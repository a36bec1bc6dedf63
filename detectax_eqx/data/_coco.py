"""Reads COCO-format datasets and checks them, so that problems are reported before training."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from ._box_format import BoxFormat
from ._dataset import CocoDataset, ImageRecord, Objects
from ._images import check_image
from ._report import Collector, DatasetError
from ._store import Location, read_bytes, to_location
from ._validate import Annotation, parse_annotations, parse_categories, parse_images, parse_parts


# Checking image files is bound by the disk or the network rather than by computation.
CHECKING_THREADS = 8
# Number of remote images to check: enough to verify the folder, the permissions and the annotated sizes.
CHECKED_IN_STORE = 16


def load_coco(
    annotations: str | Path, images: str | Path, *, check_images: bool = True, box_format: BoxFormat = "xywh"
) -> CocoDataset:
    """Reads a COCO-format annotation file and checks it together with its images.

    Segmentations are optional: polygons, or run-length encodings, compressed or not. `"segmentation": []` means none.
    `iscrowd` defaults to 0. Category ids may have gaps. Keypoints are optional, too: a category lists the names of its
    points as `keypoints`, and the bones between them as `skeleton`, in pairs of positions from 1; an annotation lists
    x, y and visibility of each point as `keypoints`.

    The following problems are repaired in memory and listed in the result's `report`. Boxes that extend beyond their
    image are clipped. Boxes without an area or outside their image are dropped together with their annotation. If a
    segmentation has several polygons, those with fewer than three points are dropped. The annotation id 0 is replaced
    by the smallest free id. A wrong `num_keypoints` is counted again.

    Boxes with a side shorter than one pixel, files listed under two image ids, keypoints outside their image, and
    keypoints that the category does not name are reported but left unchanged.

    Everything else is an error: images that are missing, truncated or not of the annotated size; unknown images or
    categories; duplicate ids; negative annotation ids; boxes in a format other than `box_format`; polygons of odd
    length or with fewer than three points; malformed run-length encodings; keypoints in another number than their names
    or with a visibility other than 0, 1 or 2; numbers that are not finite; values of a wrong type; missing keys.

    - `annotations`: the JSON file. `images`: the folder that each `file_name` is relative to. Either may be an http,
      https, gs or s3 URL.
    - `check_images`: check that every image file exists, ends as its format requires and has the annotated size. Damage
      inside a file is only detected on decoding. For remote images, which cost one request each, only a sample is
      checked. If `False`, only the annotations are checked.
    - `box_format`: the format of `bbox`. COCO's is `"xywh"`; `"xyxy"` holds two corners, `"cxcywh"` the centre and the
      size. In the normalised formats (`"normalized_xywh"`, …), boxes, polygons and keypoints hold fractions of the
      image's width and height. A wrong format is detected if at least a tenth of the boxes, and at least five, are
      implausible in it while nearly all are plausible in another. In files with fewer boxes, it shows only in the
      `report`.

    Raises a `DatasetError` that lists every problem with its file, image id, annotation id and remedy, and a
    `ConnectionError` with the URL and status if a server does not answer.

    >>> import tempfile
    >>> from detectax_eqx.data import write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=2, seed=0))
    >>> len(dataset), dataset.num_classes, dataset.category_ids, str(dataset.report)
    (2, 4, (1, 3, 4, 7), 'nothing to repair')
    """
    file, folder = to_location(annotations), to_location(images)
    if isinstance(folder, Path) and not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder of images.")
    return parse_content(read_annotations(annotations), file, folder, box_format, check_images=check_images)


def load_annotations(
    annotations: str | os.PathLike | Mapping[str, Any], *, box_format: BoxFormat = "xywh"
) -> CocoDataset:
    """Reads and checks a COCO-format annotation file as `load_coco` does, but without its images.

    The result can serve as the ground truth of an evaluation. Image entries need no `file_name`.

    - `annotations`: path or URL of the JSON file, or its content as a mapping. A mapping is first converted to JSON
      types: tuples become lists, NumPy numbers become plain numbers.
    - `box_format`: see `load_coco`.

    Raises the same errors as `load_coco`.

    >>> content = {
    ...     "images": [{"id": 1, "width": 100, "height": 100}],
    ...     "categories": [{"id": 7, "name": "cat"}],
    ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [90, 10, 50, 50]}],
    ... }
    >>> dataset = load_annotations(content)
    >>> dataset.objects(0).boxes.tolist(), str(dataset.report)
    ([[90.0, 10.0, 100.0, 60.0]], 'repaired: box partly outside ×1')
    """
    if not isinstance(annotations, Mapping):
        path = annotations if isinstance(annotations, str) else Path(annotations)
        return parse_content(read_annotations(path), to_location(path), None, box_format, check_images=False)
    file = Path("annotations")  # its name in error messages
    try:
        content = json.loads(json.dumps(dict(annotations), default=_to_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: it has a value that JSON cannot hold: {error}.") from error
    return parse_content(content, file, None, box_format, check_images=False)


def _to_json(value: Any) -> Any:
    """Converts the non-JSON types that a mapping may hold: NumPy numbers and arrays, and run lengths as bytes."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


def parse_content(
    content: dict[str, Any], file: Location, folder: Location | None, box_format: BoxFormat, *, check_images: bool
) -> CocoDataset:
    """Checks the content of a file and returns the dataset. `folder`: of the images; `None` if they are not needed."""
    problems = Collector(file)
    image_entries, annotation_entries, category_entries = parse_parts(content, file)
    categories = parse_categories(category_entries, problems)
    records = parse_images(image_entries, folder, problems)
    known = {entry["id"] for entry in image_entries if isinstance(entry, dict) and type(entry.get("id")) is int}
    by_id = {record.id: record for record in records}
    by_image = parse_annotations(annotation_entries, by_id, known, categories, problems, box_format)
    num_keypoints = max((len(category.keypoints) for category in categories), default=0)
    if check_images:
        _check_files(records, problems)
    return CocoDataset(
        images=tuple(records),
        categories=categories,
        annotations_path=file,
        report=problems.report(),
        _objects=tuple(_to_objects(by_image[record.id], num_keypoints) for record in records),
    )


def read_annotations(path: str | Path) -> dict[str, Any]:
    """Reads the content of a COCO-format file from a path or URL, without checking it. Use `load_coco` to check it.

    Raises a `DatasetError` that names the file if it does not exist or does not hold a JSON object, and a
    `ConnectionError` with the URL and status if a server does not answer.

    >>> import tempfile
    >>> from detectax_eqx.data import write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     content = read_annotations(write_shapes_dataset(folder, num_images=2, seed=0)[0])
    >>> len(content["images"]), [category["name"] for category in content["categories"]]
    (2, ['circle', 'square', 'triangle', 'star'])
    """
    file = to_location(path)
    try:
        content = json.loads(read_bytes(file))
    except FileNotFoundError:
        raise DatasetError(f"{file}: no such annotation file.") from None
    except ConnectionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file}: a COCO file must hold a JSON object, but this is a {type(content).__name__}.")
    return content


def _check_files(records: list[ImageRecord], problems: Collector) -> None:
    if records and not isinstance(records[0].path, Path):
        records = records[:: -(-len(records) // CHECKED_IN_STORE)]
    with ThreadPoolExecutor(CHECKING_THREADS) as executor:
        results = executor.map(lambda record: check_image(record.path, (record.height, record.width)), records)
        for record, problem in zip(records, results, strict=True):
            if problem is not None:
                what, remedy = problem
                problems.error("unusable image", what, remedy, image_id=record.id, image_file=record.file)


def _to_objects(annotations: list[Annotation], num_keypoints: int) -> Objects:
    return Objects(
        boxes=np.array([a.box for a in annotations], np.float32).reshape(-1, 4),
        labels=np.array([a.label for a in annotations], np.int32),
        crowd=np.array([a.crowd for a in annotations], bool),
        annotation_ids=tuple(a.id for a in annotations),
        segmentations=tuple(a.segmentation for a in annotations),
        boxes_xywh=np.array([a.box_xywh for a in annotations], np.float64).reshape(-1, 4),
        areas=np.array([a.area for a in annotations], np.float64),
        keypoints=_padded([a.keypoints for a in annotations], num_keypoints) if num_keypoints else None,
    )


def _padded(keypoints: list[np.ndarray], count: int) -> Float64[np.ndarray, "n {count} 3"]:
    """Stacks the points of objects whose categories may have fewer than `count`; the rest is not labelled."""
    stacked = np.zeros((len(keypoints), count, 3))
    for row, points in enumerate(keypoints):
        stacked[row, : len(points)] = points
    return stacked
