"""Reading a COCO-format dataset, so that what is wrong with it is known before anything is trained on it."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ._box_format import BoxFormat
from ._dataset import CocoDataset, ImageRecord, Objects
from ._images import check_image
from ._report import Collector, DatasetError
from ._store import Location, read_bytes, to_location
from ._validate import Annotation, parse_annotations, parse_categories, parse_images, parse_parts


# Looking at image files waits for the disk or the network more than it computes.
CHECKING_THREADS = 8
# Enough to see that folder, rights and sizes are right.
CHECKED_IN_STORE = 16


def load_coco(
    annotations: str | Path, images: str | Path, *, check_images: bool = True, box_format: BoxFormat = "xywh"
) -> CocoDataset:
    """Reads a COCO-format annotation file, and checks it and its images.

    Segmentations are optional, and may be polygons or run-length encodings, compressed or not; `"segmentation": []`
    means none. `iscrowd` is 0 unless given. Category ids may have gaps.

    Repaired in memory, and listed in the result's `report`: a box that reaches out of its image is clipped; one of no
    area, or outside its image, is dropped with its annotation; of a segmentation in several pieces, those with fewer
    than three points are dropped; the annotation id 0 becomes the smallest one that is free. Kept as it is, and listed
    there too: a box with a side of less than a pixel; a file under two image ids. Everything else is an error: an image
    that is missing, truncated or of another size than annotated; an unknown image or category; an id that is used
    twice, or a negative annotation id; boxes in another format than `box_format`; a polygon of odd length or with fewer
    than three points; a malformed run-length encoding; numbers that are not finite, values of a wrong type, and missing
    keys.

    - `annotations`: the JSON file. `images`: the folder that the images' `file_name` is relative to. Either may be a
      URL of http, https, gs or s3.
    - `check_images`: look at every image file: it has to be there, to end as its format ends, and to have the
      annotated size. Damage within a file shows when it is decoded. Of images in a store, which would take a request
      each, a few are looked at. Without it, only the annotations are checked.
    - `box_format`: how `bbox` is written. COCO's is `"xywh"`; `"xyxy"` holds two corners, `"cxcywh"` the centre and the
      size. `"normalized_xywh"` and so on hold fractions of the image's width and height, and so do the polygons. Boxes
      look like another format if a tenth of them, and five or more, are impossible in this one, and nearly all are
      sound in that one; in a file of fewer boxes, a mistake shows in the `report` alone.

    Raises a `DatasetError` that lists every problem with its file, image id and annotation id, and what to do, and a
    `ConnectionError` with URL and status if a store does not answer.

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
    return _parse(read_annotations(annotations), file, folder, box_format, check_images=check_images)


def load_annotations(
    annotations: str | os.PathLike | Mapping[str, Any], *, box_format: BoxFormat = "xywh"
) -> CocoDataset:
    """Reads and checks a COCO-format annotation file just as `load_coco` does, but looks for no images.

    What comes out is the truth for an evaluation. A file name is not required of its images.

    - `annotations`: the JSON file, by its path or URL; or its content, which is read as JSON holds it: a tuple is a
      list, and a NumPy number a number.
    - `box_format`: as for `load_coco`.

    Raises a `DatasetError` as `load_coco` does.

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
        return _parse(read_annotations(path), to_location(path), None, box_format, check_images=False)
    file = Path("annotations")  # what messages call it
    try:
        content = json.loads(json.dumps(dict(annotations), default=_to_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: what JSON cannot hold: {error}.") from error
    return _parse(content, file, None, box_format, check_images=False)


def _to_json(value: Any) -> Any:
    """What a dictionary in memory may hold beside JSON: NumPy's numbers and arrays, compressed run lengths as bytes."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


def _parse(
    content: dict[str, Any], file: Location, folder: Location | None, box_format: BoxFormat, *, check_images: bool
) -> CocoDataset:
    """A checked dataset. `folder`: of the images; `None` if they are not to be read."""
    problems = Collector(file)
    image_entries, annotation_entries, category_entries = parse_parts(content, file)
    categories = parse_categories(category_entries, problems)
    records = parse_images(image_entries, folder, problems)
    known = {entry["id"] for entry in image_entries if isinstance(entry, dict) and type(entry.get("id")) is int}
    labels = {category.id: label for label, category in enumerate(categories)}
    found = parse_annotations(annotation_entries, {r.id: r for r in records}, known, labels, problems, box_format)
    if check_images:
        _check_files(records, problems)
    return CocoDataset(
        images=tuple(records),
        categories=categories,
        annotations_path=file,
        report=problems.report(),
        _objects=tuple(_to_objects(found[record.id]) for record in records),
    )


def read_annotations(path: str | Path) -> dict[str, Any]:
    """The content of a COCO-format file, by its path or URL, as it is: `load_coco` checks it.

    Raises a `DatasetError` that names the file if there is none, or if it is no JSON object, and a `ConnectionError`
    with URL and status if a store does not answer.

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
        raise DatasetError(f"{file}: a COCO file is a JSON object, this is a {type(content).__name__}.")
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


def _to_objects(annotations: list[Annotation]) -> Objects:
    return Objects(
        boxes=np.array([a.box for a in annotations], np.float32).reshape(-1, 4),
        labels=np.array([a.label for a in annotations], np.int32),
        crowd=np.array([a.crowd for a in annotations], bool),
        annotation_ids=tuple(a.id for a in annotations),
        segmentations=tuple(a.segmentation for a in annotations),
        boxes_xywh=np.array([a.box_xywh for a in annotations], np.float64).reshape(-1, 4),
        areas=np.array([a.area for a in annotations], np.float64),
    )
