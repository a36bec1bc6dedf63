"""Batches of images with their ground truth, read ahead by threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from .._types import Batch, Images
from ._buckets import Bucket
from ._cache import ImageCache
from ._dataset import CocoDataset
from ._fill import Examples, Pictures, blank_examples, blank_pictures
from ._order import BatchOrder
from ._report import BadImageError, DatasetError


# The batch that is filled: images only, or images with their ground truth.
_FillT = TypeVar("_FillT", Pictures, Examples)


class Loader:
    """An endless sequence of training batches of constant batch size, determined by the seed.

    All images of a batch are from the same bucket. Batch `k` is a pure function of `(seed, k)`, independent of the
    number of threads and of where reading starts. Batches of different buckets are interleaved. Images of a bucket that
    do not fill a batch at the end of an epoch start its first batch in the next one, so that every image is used
    equally often. A bucket with fewer images than a batch is repeated within the batch.

    - `batch_size`: images per batch. `buckets`: `make_buckets(dataset.sizes, …)`.
    - `canvases`: if given, each batch draws its canvas from these at random, in place of that of its bucket. For
      detectors that resize every image to the whole canvas (`models.Square`), which thereby see several sizes.
    - `shuffle`: draw a new order in each epoch.
    - `max_objects`: rows of the targets. Further objects of an image, in the file's order, are dropped and counted in
      `overflow`. Crowds are always left out and not counted.
    - `mask_size`: side of the masks, each in the frame of its box; `None` for none.
    - `keypoints`: whether targets have keypoints, `dataset.num_keypoints` for each object. `keypoint_offset`: what is
      added to their annotated coordinates, in pixels of the image; use that of the detector.
    - `num_threads`: threads that read images. `prefetch`: batches read ahead of the one in use.
    - `drop_empty`: leave out images without objects. By default they are kept, as examples of background.
    - `rows`: the rows of each batch to read if several processes share it. Default: all.
    - `max_bad_images`: the number of unreadable images to tolerate. Their rows in the batches are not `valid`. One more
      raises an error that lists them.
    - `cache`: a folder in which to keep decoded images, which are then read about twice as fast; see `ImageCache`.

    Raises a `ValueError` if an option is out of range, if the buckets do not match the dataset, or if no image is left.
    Raises a `DatasetError` if `mask_size` is given and an object has no segmentation, or if `keypoints` is true and no
    category has any.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, make_buckets, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=5, seed=0))
    ...     buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    ...     loader = Loader(dataset, batch_size=2, buckets=buckets, max_objects=8, mask_size=28)
    ...     steps = [(k, batch.images.pixels.shape, batch.targets.masks.shape) for k, batch in loader.iterate(7, 9)]
    >>> steps
    [(7, (2, 128, 128, 3), (2, 8, 28, 28)), (8, (2, 128, 128, 3), (2, 8, 28, 28))]
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        batch_size: int,
        buckets: Sequence[Bucket],
        canvases: Sequence[tuple[int, int]] = (),
        seed: int = 0,
        shuffle: bool = True,
        max_objects: int = 100,
        mask_size: int | None = 112,
        keypoints: bool = False,
        keypoint_offset: float = 0.0,
        num_threads: int = 2,
        prefetch: int = 2,
        drop_empty: bool = False,
        rows: Sequence[int] | Int[np.ndarray, " r"] | None = None,
        max_bad_images: int = 0,
        cache: str | Path | None = None,
    ):
        numbers = {"batch_size": batch_size, "max_objects": max_objects, "num_threads": num_threads}
        _check(dataset, buckets, **numbers, prefetch=prefetch, mask_size=1 if mask_size is None else mask_size)
        if mask_size is not None:
            _check_masks(dataset, mask_size)
        if keypoints and not dataset.num_keypoints:
            raise DatasetError(
                f"{dataset.annotations_path}: no category names keypoints, but keypoints=True asks for them. "
                'List their names as "keypoints" of a category.'
            )
        if canvases and min(map(min, canvases)) < 1:
            raise ValueError(f"canvases must hold positive sizes, got {tuple(canvases)}.")
        for name, number in {"seed": seed, "max_bad_images": max_bad_images}.items():
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}.")
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not (len(self._rows) and np.isin(self._rows, np.arange(batch_size)).all()):
            raise ValueError(f"rows must be some of 0..{batch_size - 1}, got {rows}.")
        groups = [[i for i in bucket.indices if not drop_empty or _has_objects(dataset, i)] for bucket in buckets]
        self._dataset = dataset
        self._buckets = [bucket for bucket, group in zip(buckets, groups, strict=True) if group]
        if not self._buckets:
            raise ValueError("no image is left: drop_empty removes images without objects, and no image has any.")
        self._order = BatchOrder(
            [group for group in groups if group], batch_size=batch_size, seed=seed, shuffle=shuffle
        )
        self._canvases, self._seed = tuple(canvases), seed
        self._max_objects = max_objects
        self._mask_size = mask_size
        self._num_keypoints = dataset.num_keypoints if keypoints else None
        self._keypoint_offset = keypoint_offset
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._max_bad_images = max_bad_images
        self._bad_images: dict[int, BadImageError] = {}
        self._cache = None if cache is None else ImageCache(Path(cache), dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch: the number of images divided by the batch size, rounded, and at least 1."""
        return self._order.steps_per_epoch

    def indices(self, k: int) -> Int[np.ndarray, " b"]:
        """Returns the positions in the dataset of the images in all rows of batch `k`."""
        return self._order(k)[1]

    @property
    def bad_images(self) -> tuple[BadImageError, ...]:
        """The error of each image that could not be read, in batch order."""
        return tuple(self._bad_images.values())

    @property
    def cache_counts(self) -> dict[str, int]:
        """The counts of the image cache, see `ImageCache`. Empty without a cache."""
        return {} if self._cache is None else dict(self._cache.counts)

    def batch(self, k: int) -> Batch:
        """Returns batch `k`, counted across all epochs.

        Raises a `DatasetError` that names the unreadable images if there are more than `max_bad_images`, and a
        `ConnectionError` if a server does not answer.
        """
        ((_, batch),) = self.iterate(k, k + 1)
        return batch

    def iterate(self, start: int = 0, stop: int | None = None) -> Generator[tuple[int, Batch], None, None]:
        """Yields `(k, batch(k))` for `k` from `start` up to but excluding `stop`, or forever, read ahead by threads.

        The threads end when the iterator is exhausted, closed or garbage-collected. Raises the same errors as `batch`,
        when the affected batch is requested.
        """
        steps = count(start) if stop is None else range(start, stop)
        empty = ((k, self._empty(k)) for k in steps)
        filled = _read_ahead(empty, self._dataset, self._num_threads, self._prefetch, self._leave_out, self._cache)
        return ((k, examples.done()) for k, examples in filled)

    def _leave_out(self, examples: Examples, slot: int, error: BadImageError) -> None:
        """Records an unreadable image and empties its slot. Whether a slot is emptied depends only on its image."""
        self._bad_images.setdefault(int(examples.pictures.indices[slot]), error)
        if len(self._bad_images) > self._max_bad_images:
            if not self._max_bad_images:
                raise error
            errors = "\n".join(f"  {error}" for error in self._bad_images.values())
            raise DatasetError(
                f"More images than max_bad_images={self._max_bad_images} cannot be read. Repair them, or remove "
                f"them from the annotations:\n{errors}"
            )
        examples.clear(slot)

    def _empty(self, k: int) -> Examples:
        group, indices = self._order(k)
        indices = indices[self._rows]
        bucket = self._buckets[group]
        if self._canvases:
            # The order of images draws from other streams of random numbers, whose third number is smaller.
            draw = np.random.default_rng([self._seed, k, len(self._buckets) + 1])
            bucket = replace(bucket, canvas=self._canvases[draw.integers(len(self._canvases))])
        pictures = blank_pictures(indices, len(indices), bucket)
        return blank_examples(pictures, self._max_objects, self._mask_size, self._num_keypoints, self._keypoint_offset)


def eval_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    num_threads: int = 2,
    prefetch: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Images, None, None]:
    """Yields every image once, bucket by bucket. Each bucket's last batch is padded with black images, not `valid`.

    There are `sum(ceil(len(bucket.indices) / batch_size))` batches. Options, errors and threads are as for `Loader`.

    - `shard`: `(i, n)` for the batches `i`, `i + n`, `i + 2n`, …, i.e. the share of process `i` of `n`.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, make_buckets, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=3, seed=0))
    ...     buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    ...     [images.valid.tolist() for images in eval_batches(dataset, batch_size=2, buckets=buckets)]
    [[True, True], [True, False]]
    """
    _check(dataset, buckets, batch_size=batch_size, num_threads=num_threads, prefetch=prefetch)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}.")
    parts = ((bucket, i) for bucket in buckets for i in range(0, len(bucket.indices), batch_size))
    black = (
        blank_pictures(np.asarray(bucket.indices[i : i + batch_size]), batch_size, bucket)
        for bucket, i in islice(parts, shard[0], None, shard[1])
    )

    def refuse(pictures: Pictures, slot: int, error: BadImageError) -> None:
        raise error  # leaving an image out would change the metrics

    filled = _read_ahead(enumerate(black), dataset, num_threads, prefetch, refuse, None)
    return (pictures.done() for _, pictures in filled)


def _read_ahead(
    empty: Iterator[tuple[int, _FillT]],
    dataset: CocoDataset,
    num_threads: int,
    prefetch: int,
    on_bad: Callable[[_FillT, int, BadImageError], None],
    cache: ImageCache | None,
) -> Generator[tuple[int, _FillT], None, None]:
    """Fills batches in order, with `prefetch` batches in progress while the caller uses another.

    `on_bad` is called for each image that cannot be read, in batch and slot order.
    """
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="detectax-data")
    pending: deque[tuple[int, _FillT, list[Future]]] = deque()

    def submit(number: int) -> None:
        for k, batch in islice(empty, number):
            slots = np.flatnonzero(batch.valid).tolist()
            pending.append((k, batch, [executor.submit(batch.fill, slot, dataset, cache) for slot in slots]))

    try:
        submit(prefetch)
        while pending:
            k, batch, futures = pending.popleft()
            for slot, future in zip(np.flatnonzero(batch.valid).tolist(), futures, strict=True):
                try:
                    future.result()
                except BadImageError as error:
                    on_bad(batch, slot, error)
            submit(1)
            yield k, batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        if cache is not None:
            cache.flush()


def _has_objects(dataset: CocoDataset, index: int) -> bool:
    return not bool(dataset.objects(index).crowd.all())  # all() of an empty array is true


def _check(dataset: CocoDataset, buckets: Sequence[Bucket], **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    if sorted(index for bucket in buckets for index in bucket.indices) != list(range(len(dataset))):
        raise ValueError(
            f"buckets do not match this dataset of {len(dataset)} images: use make_buckets(dataset.sizes)."
        )


def _check_masks(dataset: CocoDataset, mask_size: int) -> None:
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        for i in np.flatnonzero(~objects.crowd):
            if objects.segmentations[i] is None:
                raise DatasetError(
                    f"{dataset.annotations_path}: image {image.id} ({image.file}), annotation "
                    f"{objects.annotation_ids[i]}: has no segmentation, but mask_size={mask_size} asks for masks. "
                    "Pass mask_size=None, or add a segmentation."
                )
