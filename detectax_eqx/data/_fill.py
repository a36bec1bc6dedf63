"""Batches under construction: plain arrays that threads fill, one slot per image, and then `Images` or a `Batch`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8
from PIL import Image

from .._types import Batch, Images, Targets
from ._buckets import Bucket
from ._cache import ImageCache
from ._dataset import CocoDataset, ImageRecord
from ._images import open_rgb
from ._masks import mask_in_box
from ._report import DatasetError


@dataclass(frozen=True)
class Pictures:
    """The arrays of an `Images` under construction."""

    pixels: UInt8[np.ndarray, "b h w 3"]
    sizes: Int32[np.ndarray, "b 2"]
    original_sizes: Int32[np.ndarray, "b 2"]
    indices: Int32[np.ndarray, " b"]
    valid: Bool[np.ndarray, " b"]
    canvas: tuple[int, int]

    def fill(self, slot: int, dataset: CocoDataset, cache: ImageCache | None = None) -> None:
        """Decodes the image of one slot. Raises a `DatasetError` that names it, or a store's `OSError`."""
        record = dataset.images[self.indices[slot]]
        canvas = self.pixels[slot]
        draw = partial(_draw, record, canvas)
        with _named(record):
            self.sizes[slot] = draw() if cache is None else cache.fill(int(self.indices[slot]), canvas, draw)
            self.original_sizes[slot] = record.height, record.width

    def done(self) -> Images:
        return Images(self.pixels, self.sizes, self.original_sizes, self.indices, self.valid, self.canvas)


@dataclass(frozen=True)
class Examples:
    """The arrays of a `Batch` under construction.

    - `present`: the valid rows of its targets. `keypoint_offset`: what is added to annotated coordinates of keypoints.
    """

    pictures: Pictures
    boxes: Float32[np.ndarray, "b n 4"]
    labels: Int32[np.ndarray, "b n"]
    present: Bool[np.ndarray, "b n"]
    masks: UInt8[np.ndarray, "b n s s"] | None
    keypoints: Float32[np.ndarray, "b n k 3"] | None
    overflow: Int32[np.ndarray, " b"]
    keypoint_offset: float = 0.0

    @property
    def valid(self) -> Bool[np.ndarray, " b"]:
        return self.pictures.valid

    def fill(self, slot: int, dataset: CocoDataset, cache: ImageCache | None = None) -> None:
        """Decodes the image of one slot and writes its objects. Raises the same errors as `Pictures.fill`."""
        self.pictures.fill(slot, dataset, cache)
        index = int(self.pictures.indices[slot])
        with _named(dataset.images[index]):
            self._write_objects(slot, dataset, index)

    def _write_objects(self, slot: int, dataset: CocoDataset, index: int) -> None:
        record, objects = dataset.images[index], dataset.objects(index)
        capacity = self.present.shape[1]
        non_crowd = np.flatnonzero(~objects.crowd)
        self.overflow[slot] = max(0, len(non_crowd) - capacity)
        non_crowd = non_crowd[:capacity]
        height, width = self.pictures.sizes[slot].tolist()
        ratio = np.array([width / record.width, height / record.height] * 2, np.float32)  # (4,), for (x0, y0, x1, y1)
        self.boxes[slot, : len(non_crowd)] = objects.boxes[non_crowd] * ratio
        self.labels[slot, : len(non_crowd)] = objects.labels[non_crowd]
        self.present[slot, : len(non_crowd)] = True
        if self.keypoints is not None:
            assert objects.keypoints is not None
            offset, scale = (self.keypoint_offset,) * 2 + (0.0,), (*ratio[:2], 1.0)  # the visibility stays
            self.keypoints[slot, : len(non_crowd)] = (objects.keypoints[non_crowd] + offset) * scale
        if self.masks is not None:
            for row, i in enumerate(non_crowd):
                self.masks[slot, row] = mask_in_box(
                    objects.segmentations[i], objects.boxes[i], size=self.masks.shape[-1]
                )

    def clear(self, slot: int) -> None:
        """Empties one slot: a black image without objects that is not `valid`."""
        self.pictures.pixels[slot] = 0
        for array in (self.pictures.valid, self.present, self.overflow):
            array[slot] = 0

    def done(self) -> Batch:
        frames = None if self.masks is None else self.boxes
        targets = Targets(self.boxes, self.labels, self.present, self.masks, frames, self.keypoints)
        return Batch(self.pictures.done(), targets, self.overflow)


def blank_pictures(indices: Int[np.ndarray, " n"], batch_size: int, bucket: Bucket) -> Pictures:
    """Returns a batch of black images with slots for the images of these `indices`, padded to the batch size."""
    padding = batch_size - len(indices)
    sizes = np.tile(np.array(bucket.source, np.int32), (batch_size, 1))
    return Pictures(
        pixels=np.zeros((batch_size, *bucket.source, 3), np.uint8),
        sizes=sizes,
        original_sizes=sizes.copy(),
        indices=np.pad(indices, (0, padding)).astype(np.int32),
        valid=np.arange(batch_size) < len(indices),
        canvas=bucket.canvas,
    )


def blank_examples(
    pictures: Pictures,
    max_objects: int,
    mask_size: int | None,
    num_keypoints: int | None,
    keypoint_offset: float,
) -> Examples:
    """Returns `pictures` with room for `max_objects` objects per image, all of them absent."""
    shape = len(pictures.valid), max_objects
    return Examples(
        pictures=pictures,
        boxes=np.zeros((*shape, 4), np.float32),
        labels=np.zeros(shape, np.int32),
        present=np.zeros(shape, bool),
        masks=None if mask_size is None else np.zeros((*shape, mask_size, mask_size), np.uint8),
        keypoints=None if num_keypoints is None else np.zeros((*shape, num_keypoints, 3), np.float32),
        overflow=np.zeros(shape[0], np.int32),
        keypoint_offset=keypoint_offset,
    )


def _draw(record: ImageRecord, canvas: UInt8[np.ndarray, "h w 3"]) -> tuple[int, int]:
    """Decodes an image into the top left corner of a black canvas, shrunk to fit. Returns its height and width."""
    image = open_rgb(record.path, (record.height, record.width))
    scale = min(1.0, canvas.shape[0] / record.height, canvas.shape[1] / record.width)
    if scale < 1:
        width, height = max(1, int(record.width * scale)), max(1, int(record.height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    canvas[: image.height, : image.width] = np.asarray(image)
    return image.height, image.width


@contextmanager
def _named(record: ImageRecord) -> Iterator[None]:
    """Converts any error but a `DatasetError` or `OSError` to a `DatasetError` that names the image."""
    try:
        yield
    except (DatasetError, OSError):
        raise
    except Exception as error:
        raise DatasetError(f"{record.path}: image {record.id} cannot be converted to an example: {error}") from error
