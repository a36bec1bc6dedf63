"""Checks and parses the parts of a COCO-format file.

A file may hold a million annotations. Functions that are called for each of them are excluded from the package's
runtime type checking, which would take ten times as long as the checks themselves.
"""

import math
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast, no_type_check

import numpy as np
from pycocotools import mask as coco_mask

from ._box_format import BoxFormat, check_box_format, to_coco
from ._dataset import Category, ImageRecord, Segmentation
from ._keypoints import parse_keypoints, parse_names
from ._masks import rle_counts
from ._report import Collector, DatasetError
from ._store import Location, join
from ._values import LARGEST, are_numbers, is_int, show


# Annotations are rounded to hundredths of a pixel, so extending beyond an image by less is not a mistake.
ROUNDING = 0.01
# pycocotools counts pixels in 32 bits and walks along the outline of a polygon in steps of 1/5 pixel.
MOST_PIXELS, LONGEST_OUTLINE = 2**32 - 1, 4e6
IDS_FIT = "Ids must fit into signed 64-bit integers: renumber."


class Annotation(NamedTuple):
    """A valid annotation. `box`: `(x0, y0, x1, y1)`. `box_xywh`, `area`: the numbers that evaluation uses.

    `keypoints`: `(k, 3)`, for the `k` points that its category names.
    """

    id: int
    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    segmentation: Segmentation
    box_xywh: tuple[float, float, float, float]
    area: float
    keypoints: np.ndarray


def parse_parts(content: dict[str, Any], file: Location) -> tuple[list, list, list]:
    """Returns the lists of images, annotations and categories. Raises a `DatasetError` if one is missing or invalid."""
    parts = []
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise DatasetError(f'{file}: has no "{key}". Add it, as a list.')
        if not isinstance(content[key], list):
            raise DatasetError(f'{file}: "{key}" must be a list, but is a {type(content[key]).__name__}.')
        parts.append(content[key])
    for key, part in (("images", parts[0]), ("categories", parts[2])):
        if not part:
            raise DatasetError(f'{file}: "{key}" is empty.')
    return parts[0], parts[1], parts[2]


def parse_images(entries: list, folder: Location | None, problems: Collector) -> list[ImageRecord]:
    """Returns the valid images: with a unique id, a file name and a size. Without a folder, the name is optional."""
    images, seen, files = [], set(), {}
    required = ("id", "width", "height") if folder is None else ("id", "file_name", "width", "height")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.error("wrong type", f"images[{position}] is {show(entry)}.", "Make it an object.")
            continue
        where = {"image_id": entry.get("id", f"at position {position}"), "image_file": _name(entry)}
        if not _has(entry, required, problems, where):
            continue
        name = "" if folder is None and entry.get("file_name") is None else entry["file_name"]
        if not is_int(entry["id"]):
            problems.error("wrong type", f'"id" is {show(entry["id"])}.', "Make it an integer.", **where)
        elif entry["id"] in seen:
            problems.error("duplicate image id", "another image has this id.", "Number images uniquely.", **where)
        elif not _fits(entry["id"]):
            problems.error("id too large", f'"id" is {show(entry["id"])}.', IDS_FIT, **where)
        elif not isinstance(name, str) or not (name or entry.get("file_name") is None):
            problems.error("wrong type", f'"file_name" is {show(entry["file_name"])}.', "Make it a string.", **where)
        elif not all(is_int(entry[side]) and 0 < entry[side] < LARGEST for side in ("width", "height")):
            what = f'"width" and "height" are {show(entry["width"])} and {show(entry["height"])}.'
            problems.error("wrong image size", what, "Make them positive integers.", **where)
        elif entry["width"] * entry["height"] > MOST_PIXELS:
            what = f"{entry['width']}×{entry['height']} are more pixels than a run-length encoding can count."
            problems.error("wrong image size", what, "Correct the size, or cut the image into tiles.", **where)
        else:
            path = Path(name) if folder is None else join(folder, name)
            images.append(ImageRecord(entry["id"], path, entry["height"], entry["width"]))
            first = files.setdefault(path, entry["id"]) if name else entry["id"]
            if first != entry["id"]:
                what = f"image {first} has the same file."
                problems.note("file under two image ids", what, "Both are kept.", **where)
        if is_int(entry["id"]):
            seen.add(entry["id"])
    return images


def parse_categories(entries: list, problems: Collector) -> tuple[Category, ...]:
    """Returns the valid categories, sorted by id."""
    categories: dict[int, Category] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not is_int(entry.get("id")) or not isinstance(entry.get("name"), str):
            what = f"categories[{position}] is {show(entry)}."
            problems.error("wrong category", what, 'Make it an object with an integer "id" and a string "name".')
        elif entry["id"] in categories:
            what = f'category id {entry["id"]} is both "{categories[entry["id"]].name}" and "{entry["name"]}".'
            problems.error("duplicate category id", what, "Number categories uniquely.")
        elif not _fits(entry["id"]):
            problems.error("id too large", f"categories[{position}] is {show(entry)}.", IDS_FIT)
        else:
            categories[entry["id"]] = Category(entry["id"], entry["name"], *parse_names(entry, position, problems))
    return tuple(categories[id] for id in sorted(categories))


def parse_annotations(
    entries: list,
    images: dict[int, ImageRecord],
    known_images: set,
    categories: tuple[Category, ...],
    problems: Collector,
    box_format: BoxFormat = "xywh",
) -> dict[int, list[Annotation]]:
    """Returns the valid annotations of each image, by image id.

    - `images`: the valid images by id. `known_images`: the ids of all images, so that the annotations of an invalid
      image are not reported as well.
    - `categories`: by label. `box_format`: the format of the boxes. It is an error if they appear to be in another one.
    """
    labels = {category.id: label for label, category in enumerate(categories)}
    by_image: dict[int, list[Annotation]] = {id: [] for id in images}
    seen: set[int] = set()
    boxes, box_images = [], []  # boxes as in the file, and the size of each one's image
    ids = {entry["id"] for entry in entries if isinstance(entry, dict) and is_int(entry.get("id"))}
    spare_id = next(id for id in count(1) if id not in ids)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.error("wrong type", f"annotations[{position}] is {show(entry)}.", "Make it an object.")
            continue
        image_id = entry.get("image_id")
        image_known = is_int(image_id) and image_id in known_images
        image = images.get(image_id) if image_id is not None and image_known else None
        where = {
            "image_id": image_id,
            "image_file": image.file if image else None,
            "annotation_id": entry.get("id", f"at position {position}"),
        }
        if not _has(entry, ("id", "image_id", "category_id", "bbox"), problems, where):
            continue
        sound = _check_ids(entry, image_known, seen, labels, problems, where)
        if image is None:
            continue
        written = entry["bbox"]
        if box_format != "xywh":
            entry = to_coco(entry, box_format, image.width, image.height)
        box, whole = _parse_box(entry["bbox"], image, problems, where)
        if whole:
            boxes.append(written)
            box_images.append((image.height, image.width))
        segmentation, fits = check_segmentation(entry.get("segmentation"), image, problems, where)
        if not sound:
            continue
        label, crowd, id = labels[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry["id"]
        points, marked = parse_keypoints(entry, len(categories[label].keypoints), image, problems, where)
        if whole and fits and marked and box is not None:
            if id == 0:
                what = 'pycocotools uses 0 for "no match".'
                problems.repair("annotation id 0", what, f"Renumbered to {spare_id}.", **where)
                id = spare_id
            exact = _exact_box_and_area(entry, image)
            by_image[image.id].append(Annotation(id, box, label, crowd, segmentation, *exact, points))
    check_box_format(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(box_images, np.float64).reshape(-1, 2),
        box_format,
        problems,
    )
    return by_image


@no_type_check
def _exact_box_and_area(entry: dict, image: ImageRecord) -> tuple[tuple[float, float, float, float], float]:
    """Returns the box and area for evaluation: the file's numbers unless the box is clipped. A missing area is NaN.

    The area is limited to that of the clipped box.
    """
    x, y, width, height = (float(number) for number in entry["bbox"])
    area = float(entry.get("area", math.nan))
    if not _reaches_out(entry["bbox"], image):
        return (x, y, width, height), area
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
    clipped = x0, y0, x1 - x0, y1 - y0
    return clipped, min(area, clipped[2] * clipped[3])  # NaN stays NaN in this order


@no_type_check
def _reaches_out(bbox: list, image: ImageRecord) -> bool:
    """Whether a box extends beyond its image by more than rounding can explain."""
    x, y, width, height = bbox
    return min(x, y) < -ROUNDING or x + width > image.width + ROUNDING or y + height > image.height + ROUNDING


@no_type_check
def _check_ids(
    entry: dict, image_known: bool, seen: set[int], labels: dict[int, int], problems: Collector, where: dict[str, Any]
) -> bool:
    """Whether the ids, `iscrowd` and `area` of an annotation are valid."""
    before = len(problems.errors)
    id, category = entry["id"], entry["category_id"]
    if not is_int(id):
        problems.error("wrong type", f'"id" is {show(id)}.', "Make it an integer.", **where)
    elif id < 0:
        problems.error("negative annotation id", f'"id" is {show(id)}.', "Number annotations from 1.", **where)
    elif not _fits(id):
        problems.error("id too large", f'"id" is {show(id)}.', IDS_FIT, **where)
    elif id in seen:
        what = "another annotation has this id."
        problems.error("duplicate annotation id", what, "Number annotations uniquely.", **where)
    else:
        seen.add(id)
    if not image_known:
        what = f'"image_id" is {show(entry["image_id"])}, which no image has.'
        problems.error("unknown image", what, "Correct it or remove the annotation.", **where)
    if not is_int(category) or category not in labels:
        what = f'"category_id" is {show(category)}, which is not among the categories {show(sorted(labels))}.'
        problems.error("unknown category", what, "Correct it or add the category.", **where)
    if entry.get("iscrowd", 0) not in (0, 1):
        problems.error("wrong type", f'"iscrowd" is {show(entry["iscrowd"])}.', "Make it 0 or 1.", **where)
    if "area" in entry and not (are_numbers([entry["area"]]) and entry["area"] >= 0):
        problems.error("wrong area", f'"area" is {show(entry["area"])}.', "Make it a number ≥ 0.", **where)
    return len(problems.errors) == before


@no_type_check
def _parse_box(
    bbox: Any, image: ImageRecord, problems: Collector, where: dict[str, Any]
) -> tuple[tuple[float, float, float, float] | None, bool]:
    """Returns the box clipped to its image, or `None` to drop it; and whether it could be parsed."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not are_numbers(bbox):
        what = f'"bbox" is {show(bbox)}.'
        problems.error("wrong box", what, "Make it [x, y, width, height], four finite numbers.", **where)
        return None, False
    x, y, width, height = bbox
    clipped = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
    x0, y0, x1, y1 = (float(np.float32(side)) for side in clipped)
    text = f"[{x:g}, {y:g}, {width:g}, {height:g}]"
    if width <= 0 or height <= 0:
        problems.repair("box of no area", f"{text} has no area.", "Dropped.", **where)
        return None, True
    if x1 <= x0 or y1 <= y0:
        what = f"{text} lies outside its {image.width}×{image.height} image, or is too thin to have an area."
        problems.repair("box outside the image", what, "Dropped.", **where)
        return None, True
    if _reaches_out(bbox, image):
        what = f"{text} extends beyond its {image.width}×{image.height} image."
        problems.repair("box partly outside", what, "Clipped.", **where)
    if x1 - x0 < 1 or y1 - y0 < 1:
        what = f"{text} is {x1 - x0:.2g}×{y1 - y0:.2g} pixels within its image."
        problems.note("box below a pixel", what, "It is kept.", **where)
    return (x0, y0, x1, y1), True


@no_type_check
def check_segmentation(
    value: Any, image: ImageRecord, problems: Collector, where: dict[str, Any]
) -> tuple[Segmentation, bool]:
    """Returns the segmentation, or `None` if there is none; and whether it could be parsed."""
    if value is None or value == []:
        return None, True
    if isinstance(value, dict):
        try:
            return _parse_rle(value, image), True
        except ValueError as error:
            remedy = "Encode the mask again, at the size of its image."
            problems.error("malformed run-length encoding", f"{error}.", remedy, **where)
            return None, False
    if not isinstance(value, list):
        what = f'"segmentation" is {show(value)}.'
        problems.error("wrong segmentation", what, "Make it a list of polygons or a run-length encoding.", **where)
        return None, False
    if are_numbers(value):
        what, remedy = f"it is a flat list {show(value)}.", "Make it a list of polygons: put it into another list."
        problems.error("wrong polygon", what, remedy, **where)
        return None, False
    polygons, before = [], len(problems.errors)
    for polygon in value:
        if not isinstance(polygon, list) or not are_numbers(polygon):
            what, remedy = f"it holds {show(polygon)}.", "Make it a list [x1, y1, x2, y2, …] of finite numbers."
            problems.error("wrong polygon", what, remedy, **where)
        elif len(polygon) % 2:
            what, remedy = f"it has {len(polygon)} numbers: {show(polygon)}.", "Give an x and a y for each point."
            problems.error("polygon of odd length", what, remedy, **where)
        elif len(polygon) < 6 and len(value) == 1:
            what, remedy = f"{show(polygon)} has only {len(polygon) // 2}.", "Give three or more."
            problems.error("polygon with fewer than 3 points", what, remedy, **where)
        elif len(polygon) < 6:
            what = f"{show(polygon)} is one of {len(value)} pieces."
            problems.repair("piece with fewer than 3 points", what, "Dropped the piece.", **where)
        elif (length := _outline_length(polygon)) > LONGEST_OUTLINE:
            what, remedy = f"its outline is {length:.0f} pixels long: {show(polygon)}.", "Correct its points."
            problems.error("wrong polygon", what, remedy, **where)
        else:
            polygons.append(np.asarray(polygon, np.float64).reshape(-1, 2))
    if not polygons and len(problems.errors) == before:
        problems.error("polygon with fewer than 3 points", "no piece has three points.", "Give three or more.", **where)
    return tuple(polygons), len(problems.errors) == before


@no_type_check
def _outline_length(polygon: list) -> float:
    """Returns the outline's length, max(|dx|, |dy|) summed over the edges; or an upper bound if that is small."""
    bound = (max(polygon) - min(polygon)) * len(polygon) / 2
    if bound <= LONGEST_OUTLINE:
        return bound
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


@no_type_check
def _parse_rle(rle: dict[str, Any], image: ImageRecord) -> dict[str, Any]:
    """Returns a run-length encoding with compressed counts. Raises a `ValueError` that describes a malformed one."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [image.height, image.width]:
        raise ValueError(f'its "size" is {show(size)}, but that of its image is [{image.height}, {image.width}]')
    if isinstance(counts, str):
        text = counts.encode("utf-8")
        runs = rle_counts(text)
    elif isinstance(counts, list) and counts and are_numbers(counts) and float not in map(type, counts):
        text, runs = None, np.asarray(counts, np.int64)
    else:
        raise ValueError(f'its "counts" are {show(counts)}, neither a string nor a list of integers')
    if runs.min() < 0:
        raise ValueError("its counts are not all ≥ 0")
    if runs.sum() != image.height * image.width:
        raise ValueError(f"its counts add up to {runs.sum()}, not to {image.height}·{image.width}")
    if text is None:
        return coco_mask.frPyObjects(cast(Any, {"size": size, "counts": counts}), image.height, image.width)
    return {"size": [image.height, image.width], "counts": text}


@no_type_check
def _has(entry: dict, keys: tuple[str, ...], problems: Collector, where: dict[str, Any]) -> bool:
    """Whether all keys are present and not null."""
    missing = [key for key in keys if entry.get(key) is None]
    for key in missing:
        problems.error("missing key", f'there is no "{key}".', "Add it.", **where)
    return not missing


@no_type_check
def _name(entry: dict) -> str | None:
    return entry["file_name"] if isinstance(entry.get("file_name"), str) else None


@no_type_check
def _fits(id: int) -> bool:
    return -(2**63) <= id < 2**63
