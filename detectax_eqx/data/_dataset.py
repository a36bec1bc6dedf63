"""An in-memory dataset: image records, categories, and objects as NumPy arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from ._report import Report
from ._store import Location


# Polygons as arrays of `(x, y)` points, a run-length encoding in pycocotools' format, or `None`.
Segmentation = tuple[np.ndarray, ...] | dict[str, Any] | None


@dataclass(frozen=True)
class ImageRecord:
    """An image: its id, its path or URL, and its size in the pixel coordinates of its annotations."""

    id: int
    path: Location
    height: int
    width: int

    @property
    def file(self) -> str:
        """The name of the image file, for messages."""
        return self.path.name if isinstance(self.path, Path) else unquote(self.path.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Category:
    """A class of objects: its id in the dataset and its name.

    - `keypoints`: names of its points, if it has any. `skeleton`: the bones between them, as pairs of positions in
      `keypoints`, from 0.

    >>> category = Category(1, "person", ("nose", "left_eye", "right_eye"), ((0, 1), (0, 2)))
    >>> category.keypoint_pairs
    ((1, 2),)
    """

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Category":
        """The category of `dataclasses.asdict`'s output as read from JSON. Older files have no keypoints."""
        bones = tuple((int(start), int(end)) for start, end in fields.get("skeleton", ()))
        return cls(fields["id"], fields["name"], tuple(fields.get("keypoints", ())), bones)

    @property
    def keypoint_pairs(self) -> tuple[tuple[int, int], ...]:
        """Positions of the points that a horizontal flip exchanges: those whose names differ in left and right alone.

        Every `left` in a name becomes `right`, in lower or upper case or with a capital: `left_eye` and `right_eye`,
        `LeftEye` and `RightEye`.
        """
        positions = {name: position for position, name in enumerate(self.keypoints)}
        mirrored = [(position, positions.get(_mirrored(name))) for name, position in positions.items()]
        return tuple((left, right) for left, right in mirrored if right is not None and left != right)


def _mirrored(name: str) -> str:
    """The name of a left point for that of a right one: `left` becomes `right` wherever it occurs.

    >>> _mirrored("left_eye"), _mirrored("nose")
    ('right_eye', 'nose')
    """
    for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
        name = name.replace(left, right)
    return name


@dataclass(frozen=True)
class Objects:
    """The `n` objects of an image, in the order of the annotation file.

    - `boxes`: `(x0, y0, x1, y1)` in pixels, within the image and with an area.
    - `labels`: positions in the dataset's categories. `crowd`: true for regions that stand for many objects.
    - `annotation_ids`: ids from the file. `segmentations`: for each object, polygons, each an array of `(x, y)` points;
      or a dictionary with `size` and compressed `counts`, as in pycocotools; or `None`.
    - `boxes_xywh`: `(x, y, width, height)` for evaluation: the unmodified numbers of the file, at its precision, unless
      the box was repaired. `areas`: areas from the file, by which COCO classifies objects as small, medium or large;
      NaN where the file has none.
    - `keypoints`: `(x, y, visibility)` of the `k` points of each object, `k` the largest number of any category of the
      dataset. The visibility is COCO's: 0 not labelled, 1 labelled but hidden, 2 visible. `None` if no category has
      keypoints.
    """

    boxes: Float32[np.ndarray, "n 4"]
    labels: Int32[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    annotation_ids: tuple[int, ...]
    segmentations: tuple[Segmentation, ...]
    boxes_xywh: Float64[np.ndarray, "n 4"]
    areas: Float64[np.ndarray, " n"]
    keypoints: Float64[np.ndarray, "n k 3"] | None = None


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A checked COCO-format dataset, created by `load_coco`, or by `load_annotations` without images.

    - `categories`: sorted by id. Label `k` stands for `categories[k]`, so that ids may have gaps.
    - `report`: the repairs made in memory. The file itself is not modified.
    """

    images: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    annotations_path: Location
    report: Report
    _objects: tuple[Objects, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """The number of categories, including those without objects."""
        return len(self.categories)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category id of each label."""
        return tuple(category.id for category in self.categories)

    @property
    def num_keypoints(self) -> int:
        """The largest number of keypoints of any category, 0 if none has keypoints."""
        return max((len(category.keypoints) for category in self.categories), default=0)

    @property
    def keypoint_pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of keypoints of any category that a horizontal flip exchanges, for `train.augment`."""
        return tuple(sorted({pair for category in self.categories for pair in category.keypoint_pairs}))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The `(height, width)` of each image, for `make_buckets`."""
        return tuple((image.height, image.width) for image in self.images)

    def objects(self, index: int) -> Objects:
        """The objects of `images[index]`."""
        return self._objects[index]
