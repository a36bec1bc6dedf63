"""Writes datasets as COCO files."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ..files import whole_file
from ._dataset import CocoDataset, ImageRecord, Objects, Segmentation


def write_coco(dataset: CocoDataset, file: str | Path, images: str | Path) -> None:
    """Writes a dataset as a COCO file, which `load_coco(file, images)` reads.

    Repairs made on loading are part of it, ids stay, and image files stay where they are. The file is written
    atomically.

    - `images`: the folder to which `file_name`s are relative. Every image must be in it or below it.

    Raises a `ValueError` that names an image which is not in the folder, or is a URL.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source, images = write_shapes_dataset(folder, num_images=2, seed=0)
    ...     dataset = load_coco(source, images)
    ...     write_coco(dataset, f"{folder}/copy.json", images)
    ...     copy = load_coco(f"{folder}/copy.json", images)
    >>> bool((copy.objects(1).boxes == dataset.objects(1).boxes).all())
    True
    """
    content = {
        "images": [_image(record, Path(images)) for record in dataset.images],
        "annotations": [
            annotation
            for position, record in enumerate(dataset.images)
            for annotation in _annotations(dataset.objects(position), record, dataset)
        ],
        "categories": [
            {"id": category.id, "name": category.name}
            | ({"keypoints": list(category.keypoints)} if category.keypoints else {})
            | ({"skeleton": [[a + 1, b + 1] for a, b in category.skeleton]} if category.skeleton else {})
            for category in dataset.categories
        ],
    }
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _image(record: ImageRecord, folder: Path) -> dict[str, Any]:
    if not isinstance(record.path, Path):
        raise ValueError(f"images must be files, but image {record.id} is {record.path}.")
    name = Path(os.path.relpath(record.path, folder))
    if ".." in name.parts:
        raise ValueError(f"images must be a folder that holds every image, but {record.path} is not in {folder}.")
    return {"id": record.id, "file_name": name.as_posix(), "height": record.height, "width": record.width}


def _annotations(objects: Objects, record: ImageRecord, dataset: CocoDataset) -> list[dict[str, Any]]:
    """The annotations of an image."""
    entries = []
    for row, id in enumerate(objects.annotation_ids):
        category, area = dataset.categories[objects.labels[row]], float(objects.areas[row])
        entry = {
            "id": id,
            "image_id": record.id,
            "category_id": category.id,
            "bbox": objects.boxes_xywh[row].tolist(),
            "iscrowd": int(objects.crowd[row]),
        }
        entry |= {} if math.isnan(area) else {"area": area}
        entry |= _segmentation(objects.segmentations[row])
        if objects.keypoints is not None and category.keypoints:
            points = objects.keypoints[row, : len(category.keypoints)]
            entry |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
        entries.append(entry)
    return entries


def _segmentation(value: Segmentation) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return {"segmentation": {"size": value["size"], "counts": value["counts"].decode("ascii")}}
    return {"segmentation": [polygon.ravel().tolist() for polygon in value]}
