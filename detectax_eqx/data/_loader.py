"""Batches of images with their ground truth, read by threads ahead of time."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


# What is filled: pictures alone, or with their ground truth.
_FillT = TypeVar("_FillT", Pictures, Examples)


class Loader:
    """Training batches of one size each, in an endless sequence that the seed determines.

    A batch holds images of one bucket. Batch `k` is a pure function of `(seed, k)`, whatever the number of threads and
    wherever the reading starts. Batches of different buckets are mixed; what is left of a bucket at the end of a pass
    opens its first batch in the next one, so that every image is used equally often (a bucket with fewer images than
    a batch is repeated within it).

    - `batch_size`: images a batch, always. `buckets`: `make_buckets(dataset.sizes, …)`.
    - `shuffle`: draw a new order in each pass.
    - `max_objects`: rows of the targets. An image's objects beyond it, in the file's order, are left out and counted in
      `overflow`. Crowds are never among them.
    - `mask_size`: side of the masks, each in its box's frame; `None` for boxes only.
    - `num_threads`: that read images. `prefetch`: batches read ahead of the one in use.
    - `drop_empty`: leave out images without objects. Otherwise they teach what background is.
    - `rows`: which of a batch's images to read, where several processes share them; default all.
    - `max_bad_images`: that many images may turn out to be unreadable. Their places in the batches are not `valid`; one
      more is an error that lists them.
    - `cache`: a folder that decoded images are kept in, to be read about twice as fast from then on; see `ImageCache`.

    Raises a `ValueError` if an option is out of its range, if the buckets are not those of the dataset or no image is
    left, and a `DatasetError` if masks are asked for and an object has none.

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
        seed: int = 0,
        shuffle: bool = True,
        max_objects: int = 100,
        mask_size: int | None = 112,
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
            raise ValueError("no image is left: drop_empty leaves out images without objects, and none has any.")
        self._order = BatchOrder(
            [group for group in groups if group], batch_size=batch_size, seed=seed, shuffle=shuffle
        )
        self._max_objects = max_objects
        self._mask_size = mask_size
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._max_bad_images = max_bad_images
        self._bad_images: dict[int, BadImageError] = {}
        self._cache = None if cache is None else ImageCache(Path(cache), dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Batches a pass: the number of images over the batch size, rounded, and at least 1."""
        return self._order.steps_per_epoch

    def indices(self, k: int) -> Int[np.ndarray, " b"]:
        """The images of batch `k`, all rows of it, by their position in the dataset."""
        return self._order(k)[1]

    @property
    def bad_images(self) -> tuple[BadImageError, ...]:
        """What was wrong with each image that could not be read, in the order of the batches that wanted them."""
        return tuple(self._bad_images.values())

    @property
    def cache_counts(self) -> dict[str, int]:
        """How many images the cache had: `ImageCache.counts`. Empty without one."""
        return {} if self._cache is None else dict(self._cache.counts)

    def batch(self, k: int) -> Batch:
        """Batch `k`, counted over all passes.

        Raises a `DatasetError` that names the images that cannot be read, if they are more than `max_bad_images`, and a
        `ConnectionError` if a store does not answer.
        """
        ((_, batch),) = self.iterate(k, k + 1)
        return batch

    def iterate(self, start: int = 0, stop: int | None = None) -> Generator[tuple[int, Batch], None, None]:
        """`(k, batch(k))` for `k` from `start` up to `stop`, or without end, read ahead by threads.

        The threads end when the iterator is exhausted, closed or dropped. Raises what `batch` raises, when the batch
        concerned is asked for.
        """
        steps = count(start) if stop is None else range(start, stop)
        empty = ((k, self._empty(k)) for k in steps)
        filled = _read_ahead(empty, self._dataset, self._num_threads, self._prefetch, self._leave_out, self._cache)
        return ((k, examples.done()) for k, examples in filled)

    def _leave_out(self, examples: Examples, slot: int, error: BadImageError) -> None:
        """Notes an image that cannot be read, and empties its place. That depends on the image alone."""
        self._bad_images.setdefault(int(examples.pictures.indices[slot]), error)
        if len(self._bad_images) > self._max_bad_images:
            if not self._max_bad_images:
                raise error
            errors = "\n".join(f"  {error}" for error in self._bad_images.values())
            raise DatasetError(
                f"More images than max_bad_images={self._max_bad_images} cannot be read; repair them, or remove "
                f"them from the annotations:\n{errors}"
            )
        examples.clear(slot)

    def _empty(self, k: int) -> Examples:
        group, indices = self._order(k)
        indices = indices[self._rows]
        pictures = blank_pictures(indices, len(indices), self._buckets[group])
        return blank_examples(pictures, self._max_objects, self._mask_size)


def eval_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    num_threads: int = 2,
    prefetch: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Images, None, None]:
    """Every image once, bucket by bucket, each bucket's last batch filled up with black images that are not `valid`.

    There are `sum(ceil(len(bucket.indices) / batch_size))` batches. Options, errors and threads are `Loader`'s.

    - `shard`: `(i, n)` for the batches `i`, `i + n`, `i + 2n`, …: those of one of `n` processes.

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
        raise error  # to leave an image out would change the numbers

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
    """Fills batches in order. `prefetch` of them are in work while another is with the caller.

    `on_bad` is called for each image that cannot be read, in the order of the batches and within them.
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
    return not bool(dataset.objects(index).crowd.all())  # all of none is true


def _check(dataset: CocoDataset, buckets: Sequence[Bucket], **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    if sorted(index for bucket in buckets for index in bucket.indices) != list(range(len(dataset))):
        raise ValueError(
            f"buckets are not those of this dataset of {len(dataset)} images: make_buckets(dataset.sizes)."
        )


def _check_masks(dataset: CocoDataset, mask_size: int) -> None:
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        for i in np.flatnonzero(~objects.crowd):
            if objects.segmentations[i] is None:
                raise DatasetError(
                    f"{dataset.annotations_path}: image {image.id} ({image.file}), annotation "
                    f"{objects.annotation_ids[i]}: has no segmentation, but mask_size={mask_size} asks for masks. "
                    "Pass mask_size=None, or add it."
                )
