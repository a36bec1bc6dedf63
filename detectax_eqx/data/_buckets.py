"""Canvas buckets: the small set of static shapes that images of all sizes are sorted into."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64


# `(height, width)` for images whose short side is resized to 800 unless the long side would then exceed 1333: wide,
# tall and nearly square. The last also holds images that a random scale enlarges beyond those sizes.
CANVASES = ((800, 1344), (1344, 800), (1088, 1088))
# Backbones halve the resolution five times.
STRIDE = 32


@dataclass(frozen=True)
class Bucket:
    """Images that share one compiled program. All images of a batch belong to the same bucket.

    - `canvas`: `(height, width)` of the network's input. `source`: `(height, width)` of the padded images as read from
      disk.
    - `indices`: positions of the bucket's images in their dataset.
    """

    canvas: tuple[int, int]
    source: tuple[int, int]
    indices: tuple[int, ...] = field(default=(), repr=False)


def make_buckets(
    sizes: Sequence[tuple[int, int]],
    *,
    canvases: Sequence[tuple[int, int]] = CANVASES,
    min_size: float = 800,
    max_size: float = 1333,
    max_source: int | None = None,
) -> tuple[Bucket, ...]:
    """Sorts images into buckets by size.

    Each image is assigned to the smallest canvas that holds it after a resize by `min(min_size / short,
    max_size / long)`, or, if none does, to the canvas that shrinks it least. A bucket's source canvas is the smallest
    one that holds all of the bucket's images at their size on disk and whose sides are multiples of 32. Canvases
    without images yield no bucket.

    - `sizes`: `(height, width)` of each image, such as a dataset's `sizes`.
    - `max_source`: longest side of a source canvas, a multiple of 32. Larger images are shrunk while they are read, so
      that one very large image does not enlarge every batch of its bucket. `None`: no limit.

    Raises a `ValueError` if a size is not positive or `max_source` is not a multiple of 32.

    >>> make_buckets([(480, 640), (427, 640), (640, 480)])
    (Bucket(canvas=(800, 1344), source=(480, 640)), Bucket(canvas=(1344, 800), source=(640, 480)))
    """
    if not canvases or min(min(canvas) for canvas in canvases) < 1:
        raise ValueError(f"canvases must hold one or more positive sizes, got {tuple(canvases)}.")
    if min_size <= 0 or max_size <= 0:
        raise ValueError(f"min_size and max_size must be positive, got {min_size} and {max_size}.")
    if max_source is not None and (max_source < STRIDE or max_source % STRIDE):
        raise ValueError(f"max_source must be a positive multiple of {STRIDE}, got {max_source}.")
    if not sizes:
        return ()
    pixels = np.asarray(sizes, np.int64)
    if pixels.min() < 1:
        raise ValueError(f"sizes must be positive, got {tuple(pixels[pixels.min(axis=1).argmin()].tolist())}.")
    ascending = sorted(canvases, key=lambda canvas: canvas[0] * canvas[1])
    chosen = _choose(pixels, np.asarray(ascending, np.int64), min_size, max_size)
    buckets = []
    for position, (height, width) in enumerate(ascending):
        indices = np.flatnonzero(chosen == position)
        if len(indices):
            source = -(-pixels[indices].max(axis=0) // STRIDE) * STRIDE
            if max_source is not None:
                source = np.minimum(source, max_source)
            buckets.append(Bucket((height, width), (int(source[0]), int(source[1])), tuple(indices.tolist())))
    return tuple(buckets)


def _choose(
    sizes: Int64[np.ndarray, "n 2"], canvases: Int64[np.ndarray, "b 2"], min_size: float, max_size: float
) -> Int64[np.ndarray, " n"]:
    """Returns the position of each image's canvas. `canvases` must be in ascending order of area."""
    scale = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))  # (n,)
    resized = np.maximum(np.floor(sizes * scale[:, None]), 1)  # (n, 2)
    fit = np.minimum(1.0, (canvases[None] / resized[:, None]).min(axis=2))  # (n, b); 1 where the canvas holds it
    return fit.argmax(axis=1)  # on ties the first, i.e. the smallest canvas
