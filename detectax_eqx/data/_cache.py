"""Decoded images, packed into one store and checked when they are read."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import PIL
import tensorstore as ts
from jaxtyping import Int64, UInt8

from ._dataset import CocoDataset


# A row is a header of four int64 and the pixels: size and time of the image's file, height and width on the canvas.
HEADER = 32
# What is written goes to the store in parts of this size, so that it is packed into few files.
PART = 2**26


class ImageCache:
    """The images of a dataset as the loader lays them on their source canvas, in an OCDBT store of zarr3 arrays.

    A row of an array is one image, compressed without loss, under a checksum. It is used if the checksum is right and
    size and time of the image's file are those at its writing; otherwise the image is decoded and written again. Images
    in a store of their own (http, gs, s3) are taken not to change.

    What is written becomes visible in parts, each whole or not at all: a process may be killed at any moment, and
    several may use a folder at a time. Another Pillow or another list of images makes arrays of its own.

    - `counts`: how many images were `found`, and how many `added`, rebuilt as they had `changed`, or as `damaged`.
    """

    def __init__(self, folder: Path, dataset: CocoDataset):
        self._folder = folder
        self._images = dataset.images
        names = [[PIL.__version__], *([str(image.path), image.height, image.width] for image in dataset.images)]
        self._name = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        # One context for all, with room for the nodes that lead to the images.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 2**24}})
        self._arrays: dict[tuple[int, ...], Any] = {}
        self._lock, self._writing = Lock(), Lock()
        self._new_part()
        self.counts: Counter[str] = Counter()

    def fill(
        self, index: int, canvas: UInt8[np.ndarray, "h w 3"], draw: Callable[[], tuple[int, int]]
    ) -> tuple[int, int]:
        """Puts image `index` on a black canvas and returns its height and width.

        `draw` does that where the store cannot. `flush` makes sure that what it did is then in the store.
        """
        image = self._images[index]
        if not isinstance(image.path, Path):
            stamp = -1, 0
        elif image.path.exists():
            status = image.path.stat()
            stamp = status.st_size, status.st_mtime_ns
        else:
            return draw()  # which has words for it
        array = self._array(canvas.shape)
        if index in self._part_images:
            self.flush()
        size, what = self._read(array, index, stamp, canvas)
        if size is None:
            size = draw()
            self._write(array, index, np.array([*stamp, *size], np.int64), canvas)
        with self._lock:
            self.counts[what] += 1
        return size

    def _read(
        self, array: Any, index: int, stamp: tuple[int, int], canvas: UInt8[np.ndarray, "h w 3"]
    ) -> tuple[tuple[int, int] | None, str]:
        try:
            row = array[index].read().result()
        except ValueError:  # of a checksum, or of what leads to the row
            return None, "damaged"
        *stored, height, width = row[:HEADER].view(np.int64).tolist()
        if not height:
            return None, "added"
        if tuple(stored) != stamp:
            return None, "changed"
        canvas[:] = row[HEADER:].reshape(canvas.shape)
        return (height, width), "found"

    def _write(
        self, array: Any, index: int, header: Int64[np.ndarray, " 4"], canvas: UInt8[np.ndarray, "h w 3"]
    ) -> None:
        row = np.concatenate([header.view(np.uint8), canvas.ravel()])
        with self._writing:
            try:
                array.with_transaction(self._part)[index].write(row).result()
            except ValueError as error:
                raise self._error(error) from error
            self._part_images.add(index)
            self._part_size += row.size
            if self._part_size >= PART:
                self._commit()

    def flush(self) -> None:
        """Writes what is not yet in the store. Raises an `OSError` that says what to do if that fails."""
        with self._writing:
            if self._part_size:
                self._commit()

    def _new_part(self) -> None:
        """What is written next is not in the store until it is committed."""
        self._part, self._part_size, self._part_images = ts.Transaction(atomic=True), 0, set()

    def _commit(self) -> None:
        part = self._part
        try:
            part.commit_sync()
        except ValueError as error:
            raise self._error(error) from error
        finally:
            self._new_part()

    def _array(self, shape: tuple[int, ...]) -> Any:
        with self._lock:
            if shape not in self._arrays:
                spec = _spec(self._folder, f"{self._name}-{shape[0]}x{shape[1]}", len(self._images), shape)
                try:
                    self._arrays[shape] = ts.open(spec, open=True, create=True, context=self._context).result()
                except ValueError as error:
                    raise self._error(error) from error
            return self._arrays[shape]

    def _error(self, error: ValueError) -> OSError:
        return OSError(
            f"The cache {self._folder} cannot be used: {error}. Make room there or give another folder; if it is "
            f"damaged, delete it: it is rebuilt."
        )


def _spec(folder: Path, name: str, number: int, shape: tuple[int, ...]) -> dict[str, Any]:
    row = HEADER + shape[0] * shape[1] * shape[2]
    # LZ4 costs less than reading what it saves: the black parts of canvases, and little else.
    squeezed = {"cname": "lz4", "clevel": 1, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{folder.resolve()}/"},
            "path": f"{name}/",
        },
        "metadata": {
            "shape": [number, row],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, row]}},
            "codecs": [
                {"name": "bytes"},
                {"name": "blosc", "configuration": squeezed},
                {"name": "crc32c"},
            ],
        },
    }
