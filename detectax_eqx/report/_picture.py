"""Images of a dataset in a page: thumbnails, boxes and masks at their size, and class colors."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from .. import data, draw, evaluate
from ._page import file_name


# The maximum length of the longest side of a thumbnail and of a mask, in pixels.
THUMBNAIL, LONGEST = 480, 240
JPEG_QUALITY = 72


class Picture:
    """An image of a dataset as a thumbnail. `entry` is what a page needs to show it."""

    def __init__(self, image: data.ImageRecord):
        self._source = image.height, image.width
        uri, self._size = thumbnail(data.read_image(image.path, size=self._source))
        height, width = mask_size(self._size)
        self.entry = {
            "id": image.id,
            "name": file_name(image.path),
            "src": uri,
            "width": self._size[1],
            "height": self._size[0],
            "mask_width": width,
            "mask_height": height,
        }

    def box(self, corners: np.ndarray) -> list[float]:
        """A box `(x0, y0, x1, y1)` of the image in the thumbnail's pixels."""
        scale = np.array([self._size[1] / self._source[1], self._size[0] / self._source[0]] * 2)
        return (corners * scale).round(1).tolist()

    def mask(self, segmentation: Any) -> str | None:
        """A segmentation of the image as `shrink_mask` returns it."""
        return shrink_mask(segmentation, self._source, mask_size(self._size))


def class_entries(dataset: data.CocoDataset) -> list[dict[str, str]]:
    """The name and color of each class."""
    return [
        {"name": category.name, "color": "#{:02x}{:02x}{:02x}".format(*draw.class_color(label))}
        for label, category in enumerate(dataset.categories)
    ]


def thumbnail(image: np.ndarray) -> tuple[str, tuple[int, int]]:
    """Shrinks an RGB image to a small JPEG. Returns its data URI and its `(height, width)`."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return uri, (picture.height, picture.width)


def mask_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """The `(height, width)` at which the masks of an image of size `(height, width)` are stored."""
    scale = min(1.0, LONGEST / max(image_size))
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def shrink_mask(segmentation: Any, image_size: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Resizes a segmentation (polygons or run lengths) to `(height, width)`, as compressed run lengths.

    Returns `None` if there is no segmentation.
    """
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        pixels = Image.fromarray(data.decode_rle(segmentation) * 255).resize((size[1], size[0]), Image.Resampling.BOX)
        return evaluate.encode_mask(np.asarray(pixels) > 127)["counts"]
    scale = np.array([size[1] / image_size[1], size[0] / image_size[0]])
    polygons = tuple(points * scale for points in segmentation)
    return data.encode_segmentation(polygons, size)["counts"].decode("ascii")
