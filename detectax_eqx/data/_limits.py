"""What the limits on sizes and counts cut from a dataset, known before anything is trained on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._buckets import CANVASES, STRIDE, Bucket
from ._dataset import CocoDataset


# A bilinear resize by a half uses every pixel; by less, it skips some. What is larger is averaged down on reading.
SOURCE_PER_CANVAS = 2
# Sides of a resized image are rounded down to whole pixels, which is no limit's doing.
ROUNDING = 1


@dataclass(frozen=True)
class Limits:
    """Counts of what each limit cuts.

    - `images`, `objects`: in all; crowds are not objects.
    - `objects_dropped`, `images_with_drops`: objects beyond `max_objects`, and in how many images they are.
    - `shrunk_on_reading`: images larger than their bucket's source canvas. `largest_source` is its longest side.
    - `shrunk_to_fit`: images that are made smaller than `min_size` and `max_size` ask for, as no canvas holds them.
    - `below_a_pixel`: objects with a side of less than a pixel once their image has its final size.

    `str` says all of it that is not 0, one line for each limit.
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
        """One line for each limit that cuts something."""
        found = []
        if self.objects_dropped:
            found.append(
                f"max_objects={self.max_objects} leaves out {self.objects_dropped:,} of {self.objects:,} objects, in "
                f"{self.images_with_drops:,} of {self.images:,} images"
            )
        if self.shrunk_on_reading:
            found.append(
                f"{self.shrunk_on_reading:,} of {self.images:,} images are larger than {self.largest_source} pixels "
                "and are shrunk on reading"
            )
        if self.shrunk_to_fit:
            found.append(
                f"{self.shrunk_to_fit:,} of {self.images:,} images fit on no canvas at their size and are shrunk more"
            )
        if self.below_a_pixel:
            found.append(f"{self.below_a_pixel:,} of {self.objects:,} objects are less than a pixel wide or high")
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(self.lines) or "no limit cuts anything"


def source_limit(canvases: Sequence[tuple[int, int]] = CANVASES) -> int:
    """The longest side that a source image needs for these canvases: twice their longest, a multiple of 32.

    Pass it to `make_buckets` as `max_source`, for training and for evaluation alike. The resize to the canvas then
    shrinks by no more than a half, which uses every pixel.

    Raises a `ValueError` if there is no canvas, or one has a side that is not positive.

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
    """Counts what each limit will cut from a dataset, from its sizes and boxes alone: no image is read.

    - `buckets`: `make_buckets(dataset.sizes, …)`. `min_size`, `max_size`: what they were made with.
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
    counts = np.array([len(part) for part in boxes], np.int64)
    dropped = np.maximum(counts - max_objects, 0) if max_objects is not None else np.zeros_like(counts)
    on_reading, to_fit, tiny = 0, 0, 0
    sizes = dataset.sizes
    for bucket in buckets:
        for index in bucket.indices:
            size = np.array(sizes[index], np.float64)  # (2,)
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
