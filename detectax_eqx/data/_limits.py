"""Counts what the limits on sizes and object numbers remove from a dataset, before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._buckets import CANVASES, STRIDE, Bucket
from ._dataset import CocoDataset


# A bilinear resize by 1/2 uses every pixel; a smaller factor skips some. Larger images are averaged down on reading.
SOURCE_PER_CANVAS = 2
# Sides of a resized image are rounded down to whole pixels, which does not count as shrinking.
ROUNDING = 1


@dataclass(frozen=True)
class Limits:
    """The number of images and objects that each limit affects.

    - `images`, `objects`: totals. Crowds do not count as objects.
    - `objects_dropped`, `images_with_drops`: objects in excess of `max_objects`, and the number of images with any.
    - `largest_source`: the longest side of any bucket's source canvas. `shrunk_on_reading`: images larger than their
      bucket's.
    - `shrunk_to_fit`: images resized to less than `min_size` and `max_size` ask for, because no canvas holds them.
    - `below_a_pixel`: objects with a side shorter than one pixel after their image is resized.

    `str` gives one line for each count that is not 0.
    """

    images: int
    objects: int
    max_objects: int | None
    objects_dropped: int
    images_with_drops: int
    largest_source: int
    shrunk_on_reading: int
    shrunk_to_fit: int
    below_a_pixel: int

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each limit that has an effect."""
        lines = []
        if self.objects_dropped:
            lines.append(
                f"max_objects={self.max_objects} leaves out {self.objects_dropped:,} of {self.objects:,} objects, in "
                f"{self.images_with_drops:,} of {self.images:,} images"
            )
        if self.shrunk_on_reading:
            lines.append(
                f"{self.shrunk_on_reading:,} of {self.images:,} images are larger than {self.largest_source} pixels "
                "and are shrunk on reading"
            )
        if self.shrunk_to_fit:
            lines.append(
                f"{self.shrunk_to_fit:,} of {self.images:,} images do not fit any canvas at their target size and are "
                "shrunk further"
            )
        if self.below_a_pixel:
            lines.append(f"{self.below_a_pixel:,} of {self.objects:,} objects are less than a pixel wide or high")
        return tuple(lines)

    def __str__(self) -> str:
        return "\n".join(self.lines) or "no limit has an effect"


def source_limit(canvases: Sequence[tuple[int, int]] = CANVASES) -> int:
    """Returns the longest side that source images need for these canvases: twice their longest side, a multiple of 32.

    Pass it to `make_buckets` as `max_source`, both for training and for evaluation. The resize to the canvas then
    shrinks by at most a factor of 2, which uses every pixel.

    Raises a `ValueError` if `canvases` is empty or a side is not positive.

    >>> source_limit([(800, 1344), (1344, 800)]), source_limit([(2048, 3072)])
    (2688, 6144)
    """
    if not canvases or min(min(canvas) for canvas in canvases) < 1:
        raise ValueError(f"canvases must hold one or more positive sizes, got {tuple(canvases)}.")
    return -(-max(max(canvas) for canvas in canvases) * SOURCE_PER_CANVAS // STRIDE) * STRIDE


def describe_limits(
    dataset: CocoDataset,
    *,
    buckets: Sequence[Bucket],
    max_objects: int | None = None,
    min_size: int = 800,
    max_size: int = 1333,
) -> Limits:
    """Counts the images and objects that each limit affects. Only sizes and boxes are used; no image is read.

    - `buckets`: `make_buckets(dataset.sizes, …)`. `min_size`, `max_size`: the values that the buckets were made with.
    - `max_objects`: as for `Loader`. `None`: no limit.

    Raises a `ValueError` if `max_objects`, `min_size` or `max_size` is not positive.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, make_buckets, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=5, seed=0))
    >>> sizes = {"min_size": 128, "max_size": 128}
    >>> buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], **sizes)
    >>> print(describe_limits(dataset, buckets=buckets, max_objects=2, **sizes))
    max_objects=2 leaves out 13 of 23 objects, in 5 of 5 images
    """
    for name, number in {"max_objects": max_objects, "min_size": min_size, "max_size": max_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    boxes = [objects.boxes[~objects.crowd] for objects in map(dataset.objects, range(len(dataset)))]
    counts = np.array([len(of_image) for of_image in boxes], np.int64)
    dropped = np.maximum(counts - max_objects, 0) if max_objects is not None else np.zeros_like(counts)
    on_reading, to_fit, tiny = 0, 0, 0
    sizes = dataset.sizes
    for bucket in buckets:
        for index in bucket.indices:
            size = np.array(sizes[index], np.float64)  # (height, width)
            wanted = size * min(min_size / size.min(), max_size / size.max())
            fit = min(1.0, *(np.array(bucket.canvas) / np.floor(np.maximum(wanted, 1))))
            on_reading += bool((size > bucket.source).any())
            to_fit += bool((wanted * (1 - fit) > ROUNDING).any())
            scale = wanted[::-1] * fit / size[::-1]  # (x, y)
            sides = (boxes[index][:, 2:] - boxes[index][:, :2]) * scale
            tiny += int((sides < 1).any(axis=1).sum())
    return Limits(
        images=len(dataset),
        objects=int(counts.sum()),
        max_objects=max_objects,
        objects_dropped=int(dropped.sum()),
        images_with_drops=int((dropped > 0).sum()),
        largest_source=max((max(bucket.source) for bucket in buckets), default=0),
        shrunk_on_reading=on_reading,
        shrunk_to_fit=to_fit,
        below_a_pixel=tiny,
    )
