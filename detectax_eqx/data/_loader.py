"""Batches of images with their ground truth, read by threads ahead of time."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

import numpy as np
from jaxtyping import Int
from PIL import Image

from .._types import Batch, Targets
from ._buckets import Bucket
from ._dataset import CocoDataset, ImageRecord, Objects
from ._images import open_rgb
from ._masks import mask_in_box
from ._order import BatchOrder
from ._report import DatasetError


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
    ):
        _check(dataset, buckets, batch_size, max_objects, mask_size, num_threads, prefetch)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
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

    @property
    def steps_per_epoch(self) -> int:
        """Batches a pass: the number of images over the batch size, rounded, and at least 1."""
        return self._order.steps_per_epoch

    def batch(self, k: int) -> Batch:
        """Batch `k`, counted over all passes. Raises a `DatasetError` that names the image that cannot be read."""
        batch = self._empty(k)
        for slot in range(len(batch.valid)):
            _fill(batch, slot, self._dataset)
        return batch

    def iterate(self, start: int = 0, stop: int | None = None) -> Generator[tuple[int, Batch], None, None]:
        """`(k, batch(k))` for `k` from `start` up to `stop`, or without end, read ahead by threads.

        The threads end when the iterator is exhausted, closed or dropped. Raises what `batch` raises, when the batch
        concerned is asked for.
        """
        steps = count(start) if stop is None else range(start, stop)
        empty = ((k, self._empty(k)) for k in steps)
        return _read_ahead(empty, self._dataset, self._num_threads, self._prefetch)

    def _empty(self, k: int) -> Batch:
        group, indices = self._order(k)
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
) -> Iterator[Batch]:
    """Every image once, bucket by bucket, each bucket's last batch filled up with black images that are not `valid`.

    There are `sum(ceil(len(bucket.indices) / batch_size))` batches. Options, errors and threads are `Loader`'s.

    >>> import tempfile
    >>> from detectax_eqx.data import load_coco, make_buckets, write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset = load_coco(*write_shapes_dataset(folder, num_images=3, seed=0))
    ...     buckets = make_buckets(dataset.sizes, canvases=[(128, 128)], min_size=128, max_size=128)
    ...     [batch.valid.tolist() for batch in eval_batches(dataset, batch_size=2, buckets=buckets)]
    [[True, True], [True, False]]
    """
    _check(dataset, buckets, batch_size, max_objects, mask_size, num_threads, prefetch)
    empty = (
        _make_empty(np.asarray(bucket.indices[i : i + batch_size]), batch_size, bucket, max_objects, mask_size)
        for bucket in buckets
        for i in range(0, len(bucket.indices), batch_size)
    )
    return (batch for _, batch in _read_ahead(enumerate(empty), dataset, num_threads, prefetch))


def _read_ahead(
    empty: Iterator[tuple[int, Batch]], dataset: CocoDataset, num_threads: int, prefetch: int
) -> Generator[tuple[int, Batch], None, None]:
    """Fills batches in order. `prefetch` of them are in work while another is with the caller."""
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="detectax-data")
    pending: deque[tuple[int, Batch, list[Future]]] = deque()

    def submit(number: int) -> None:
        for k, batch in islice(empty, number):
            slots = np.flatnonzero(batch.valid).tolist()
            pending.append((k, batch, [executor.submit(_fill, batch, slot, dataset) for slot in slots]))

    try:
        submit(prefetch)
        while pending:
            k, batch, futures = pending.popleft()
            for future in futures:
                future.result()
            submit(1)
            yield k, batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


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


def _fill(batch: Batch, slot: int, dataset: CocoDataset) -> None:
    """Writes one example into its place in a batch."""
    record = dataset.images[int(batch.indices[slot])]
    try:
        _write(batch, slot, record, dataset.objects(int(batch.indices[slot])))
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(f"{record.path}: image {record.id} cannot be made an example of: {error}") from error


def _write(batch: Batch, slot: int, record: ImageRecord, objects: Objects) -> None:
    targets = batch.targets
    image = open_rgb(record.path, (record.height, record.width))
    canvas: np.ndarray = batch.images[slot]  # type: ignore[assignment]
    scale = min(1.0, canvas.shape[0] / record.height, canvas.shape[1] / record.width)
    if scale < 1:
        width, height = max(1, int(record.width * scale)), max(1, int(record.height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    canvas[: image.height, : image.width] = np.asarray(image)
    batch.image_sizes[slot] = image.height, image.width  # type: ignore[index]
    batch.original_sizes[slot] = record.height, record.width  # type: ignore[index]
    kept = np.flatnonzero(~objects.crowd)
    batch.overflow[slot] = max(0, len(kept) - targets.valid.shape[1])  # type: ignore[index]
    kept = kept[: targets.valid.shape[1]]
    ratio = np.array([image.width / record.width, image.height / record.height] * 2, np.float32)
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
                        f"{dataset.annotations_path}: image {image.id} ({image.path.name}), annotation "
                        f"{objects.annotation_ids[i]}: has no segmentation, but mask_size={mask_size} asks for masks. "
                        "Pass mask_size=None, or add it."
                    )
