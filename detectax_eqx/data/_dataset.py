"""A dataset in memory: images, categories and objects, as NumPy arrays."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from ._report import Report
from ._store import Location


# Polygons as arrays of `(x, y)` points, a run-length encoding as pycocotools has it, or nothing.
Segmentation = tuple[np.ndarray, ...] | dict[str, Any] | None


@dataclass(frozen=True)
class ImageRecord:
    """An image: its id, where it lies (a path or a URL), and its size in the pixels that its annotations refer to."""

    id: int
    path: Location
    height: int
    width: int

    @property
    def file(self) -> str:
        """The name of its file, for messages."""
        return self.path.name if isinstance(self.path, Path) else unquote(self.path.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Category:
    """A class of objects: the dataset's own id and its name."""

    id: int
    name: str


@dataclass(frozen=True)
class Objects:
    """The `n` objects of an image, in the file's order.

    - `boxes`: `(x0, y0, x1, y1)` in pixels, within the image and with an area.
    - `labels`: positions in the dataset's categories. `crowd`: marks groups that stand for many objects.
    - `annotation_ids`: the file's. `segmentations`: polygons, each an array of `(x, y)` points; or a dictionary with
      `size` and compressed `counts` as pycocotools has it; or `None`.
    - `boxes_xywh`: `(x, y, width, height)` for evaluation: the file's own numbers, in its precision, unless the box was
      repaired. `areas`: the file's, by which COCO sorts objects into small, medium and large; NaN where it has none.
    """

    boxes: Float32[np.ndarray, "n 4"]
    labels: Int32[np.ndarray, " n"]
    crowd: Bool[np.ndarray, " n"]
    annotation_ids: tuple[int, ...]
    segmentations: tuple[Segmentation, ...]
    boxes_xywh: Float64[np.ndarray, "n 4"]
    areas: Float64[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A COCO-format dataset that was checked. `load_coco` makes it, and `load_annotations` one without images.

    - `categories`: sorted by id. Label `k` means `categories[k]`, so gaps in the ids are no concern.
    - `report`: what was repaired in memory. The file is left as it is.
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
        """The number of categories, those without a single object included."""
        return len(self.categories)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category id of each label."""
        return tuple(category.id for category in self.categories)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The `(height, width)` of each image, as `make_buckets` takes them."""
        return tuple((image.height, image.width) for image in self.images)

    def objects(self, index: int) -> Objects:
        """The objects of `images[index]`."""
        return self._objects[index]
