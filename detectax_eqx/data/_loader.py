"""Batches of images with their ground truth, read by threads ahead of time."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from .._types import Batch, Targets
from ._buckets import Bucket
from ._cache import ImageCache
from ._dataset import CocoDataset, ImageRecord, Objects
from ._images import open_rgb
from ._masks import mask_in_box
from ._order import BatchOrder
from ._report import BadImageError, DatasetError


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
    ...     steps = [(k, batch.images.shape, batch.targets.masks.shape) for k, batch in loader.iterate(7, 9)]
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
        _check(dataset, buckets, batch_size, max_objects, mask_size, num_threads, prefetch)
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
        return _read_ahead(empty, self._dataset, self._num_threads, self._prefetch, self._leave_out, self._cache)

    def _leave_out(self, batch: Batch, slot: int, error: BadImageError) -> None:
        """Notes an image that cannot be read, and empties its place. That depends on the image alone."""
        self._bad_images.setdefault(int(batch.indices[slot]), error)
        if len(self._bad_images) > self._max_bad_images:
            if not self._max_bad_images:
                raise error
            errors = "\n".join(f"  {error}" for error in self._bad_images.values())
            raise DatasetError(
                f"More images than max_bad_images={self._max_bad_images} cannot be read; repair them, or remove "
                f"them from the annotations:\n{errors}"
            )
        batch.valid[slot] = False  # type: ignore[index]
        batch.images[slot] = 0  # type: ignore[index]
        batch.targets.valid[slot] = False  # type: ignore[index]
        batch.overflow[slot] = 0  # type: ignore[index]

    def _empty(self, k: int) -> Batch:
        group, indices = self._order(k)
        indices = indices[self._rows]
        return _make_empty(indices, len(indices), self._buckets[group], self._max_objects, self._mask_size)


def eval_batches(
    dataset: CocoDataset,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    max_objects: int = 100,
    mask_size: int | None = None,
    num_threads: int = 2,
    prefetch: int = 2,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every image once, bucket by bucket, each bucket's last batch filled up with black images that are not `valid`.

    There are `sum(ceil(len(bucket.indices) / batch_size))` batches. Options, errors and threads are `Loader`'s.

    - `shard`: `(i, n)` for the batches `i`, `i + n`, `i + 2n`, …: those of one of `n` processes.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, make_buckets, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=3, seed=0))
    ...     buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    ...     [batch.valid.tolist() for batch in eval_batches(dataset, batch_size=2, buckets=buckets)]
    [[True, True], [True, False]]
    """
    _check(dataset, buckets, batch_size, max_objects, mask_size, num_threads, prefetch)
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}.")
    parts = ((bucket, i) for bucket in buckets for i in range(0, len(bucket.indices), batch_size))
    empty = (
        _make_empty(np.asarray(bucket.indices[i : i + batch_size]), batch_size, bucket, max_objects, mask_size)
        for bucket, i in islice(parts, shard[0], None, shard[1])
    )

    def refuse(batch: Batch, slot: int, error: BadImageError) -> None:
        raise error  # to leave an image out would change the numbers

    return (batch for _, batch in _read_ahead(enumerate(empty), dataset, num_threads, prefetch, refuse, None))


def _read_ahead(
    empty: Iterator[tuple[int, Batch]],
    dataset: CocoDataset,
    num_threads: int,
    prefetch: int,
    on_bad: Callable[[Batch, int, BadImageError], None],
    cache: ImageCache | None,
) -> Generator[tuple[int, Batch], None, None]:
    """Fills batches in order. `prefetch` of them are in work while another is with the caller.

    `on_bad` is called for each image that cannot be read, in the order of the batches and within them.
    """
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="detectax-data")
    pending: deque[tuple[int, Batch, list[Future]]] = deque()

    def submit(number: int) -> None:
        for k, batch in islice(empty, number):
            slots = np.flatnonzero(batch.valid).tolist()
            pending.append((k, batch, [executor.submit(_fill, batch, slot, dataset, cache) for slot in slots]))

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


def _make_empty(
    indices: Int[np.ndarray, " n"], batch_size: int, bucket: Bucket, max_objects: int, mask_size: int | None
) -> Batch:
    """A batch whose images and targets have yet to be written."""
    masks = None if mask_size is None else np.zeros((batch_size, max_objects, mask_size, mask_size), np.uint8)
    boxes = np.zeros((batch_size, max_objects, 4), np.float32)
    filler = batch_size - len(indices)
    return Batch(
        images=np.zeros((batch_size, *bucket.source, 3), np.uint8),
        image_sizes=np.tile(np.array(bucket.source, np.int32), (batch_size, 1)),
        original_sizes=np.tile(np.array(bucket.source, np.int32), (batch_size, 1)),
        targets=Targets(
            boxes=boxes,
            labels=np.zeros((batch_size, max_objects), np.int32),
            valid=np.zeros((batch_size, max_objects), bool),
            masks=masks,
            mask_boxes=None if masks is None else boxes,
        ),
        indices=np.pad(indices, (0, filler)).astype(np.int32),
        valid=np.arange(batch_size) < len(indices),
        overflow=np.zeros(batch_size, np.int32),
        canvas=bucket.canvas,
    )


def _fill(batch: Batch, slot: int, dataset: CocoDataset, cache: ImageCache | None) -> None:
    """Writes one example into its place in a batch."""
    index = int(batch.indices[slot])
    record = dataset.images[index]
    try:
        canvas: np.ndarray = batch.images[slot]  # type: ignore[assignment]
        draw = partial(_draw, record, canvas)
        size = draw() if cache is None else cache.fill(index, canvas, draw)
        batch.image_sizes[slot] = size  # type: ignore[index]
        batch.original_sizes[slot] = record.height, record.width  # type: ignore[index]
        _write_objects(batch, slot, record, dataset.objects(index))
    except (DatasetError, OSError):  # the image's, the store's or the cache's
        raise
    except Exception as error:
        raise DatasetError(f"{record.path}: image {record.id} cannot be made an example of: {error}") from error


def _draw(record: ImageRecord, canvas: UInt8[np.ndarray, "h w 3"]) -> tuple[int, int]:
    """Puts an image into the corner of a black canvas, shrunk if it is too large, and returns its height and width."""
    image = open_rgb(record.path, (record.height, record.width))
    scale = min(1.0, canvas.shape[0] / record.height, canvas.shape[1] / record.width)
    if scale < 1:
        width, height = max(1, int(record.width * scale)), max(1, int(record.height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    canvas[: image.height, : image.width] = np.asarray(image)
    return image.height, image.width


def _write_objects(batch: Batch, slot: int, record: ImageRecord, objects: Objects) -> None:
    """Writes the objects of an image whose pixels are in their place."""
    targets = batch.targets
    kept = np.flatnonzero(~objects.crowd)
    batch.overflow[slot] = max(0, len(kept) - targets.valid.shape[1])  # type: ignore[index]
    kept = kept[: targets.valid.shape[1]]
    height, width = np.asarray(batch.image_sizes)[slot].tolist()
    ratio = np.array([width / record.width, height / record.height] * 2, np.float32)
    targets.boxes[slot, : len(kept)] = objects.boxes[kept] * ratio  # type: ignore[index]
    targets.labels[slot, : len(kept)] = objects.labels[kept]  # type: ignore[index]
    targets.valid[slot, : len(kept)] = True  # type: ignore[index]
    if targets.masks is not None:
        for row, i in enumerate(kept):
            mask = mask_in_box(objects.segmentations[i], objects.boxes[i], size=targets.masks.shape[-1])
            targets.masks[slot, row] = mask  # type: ignore[index]


def _has_objects(dataset: CocoDataset, index: int) -> bool:
    return not bool(dataset.objects(index).crowd.all())  # all of none is true


def _check(
    dataset: CocoDataset,
    buckets: Sequence[Bucket],
    batch_size: int,
    max_objects: int,
    mask_size: int | None,
    num_threads: int,
    prefetch: int,
) -> None:
    numbers = {"batch_size": batch_size, "max_objects": max_objects, "num_threads": num_threads, "prefetch": prefetch}
    for name, number in {**numbers, "mask_size": 1 if mask_size is None else mask_size}.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}.")
    if sorted(index for bucket in buckets for index in bucket.indices) != list(range(len(dataset))):
        raise ValueError(
            f"buckets are not those of this dataset of {len(dataset)} images: make_buckets(dataset.sizes)."
        )
    if mask_size is not None:
        for index, image in enumerate(dataset.images):
            objects = dataset.objects(index)
            for i in np.flatnonzero(~objects.crowd):
                if objects.segmentations[i] is None:
                    raise DatasetError(
                        f"{dataset.annotations_path}: image {image.id} ({image.file}), annotation "
                        f"{objects.annotation_ids[i]}: has no segmentation, but mask_size={mask_size} asks for masks. "
                        "Pass mask_size=None, or add it."
                    )
