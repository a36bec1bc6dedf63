"""A cache of decoded images, packed into one store and verified on reading."""

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


# A row is a header of four int64 values, then the pixels. The header holds the size and modification time of the image
# file, and the image's height and width on the canvas.
HEADER = 32
# Bytes per transaction. Rows are written in transactions of this size, so that they are packed into few files.
PART = 2**26


class ImageCache:
    """The decoded images of a dataset, padded to their source canvas, in an OCDBT store of zarr3 arrays.

    Each row of an array is one image with a checksum, compressed losslessly. A row is used if its checksum is correct
    and the image file still has the size and modification time recorded in it. Otherwise the image is decoded and
    written again. Remote images (http, gs, s3) are assumed not to change.

    Rows become visible in atomic transactions: a process may be killed at any time, and several processes may use the
    same folder. A different Pillow version or list of images uses separate arrays.

    - `counts`: how many images were `found`, `added`, or rebuilt because the file had `changed` or the row was
      `damaged`.
    """

    def __init__(self, folder: Path, dataset: CocoDataset):
        self._folder = folder
        if folder.is_file():
            raise self._error("it is a file")
        self._images = dataset.images
        names = [[PIL.__version__], *([str(image.path), image.height, image.width] for image in dataset.images)]
        self._name = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        # One context for all arrays; its pool has room for the index nodes that lead to the images.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 2**24}})
        self._arrays: dict[tuple[int, ...], Any] = {}
        self._lock, self._writing = Lock(), Lock()
        self._new_part()
        self.counts: Counter[str] = Counter()

    def fill(
        self, index: int, canvas: UInt8[np.ndarray, "h w 3"], draw: Callable[[], tuple[int, int]]
    ) -> tuple[int, int]:
        """Copies image `index` onto a black canvas and returns its height and width there.

        An image that is not in the store is decoded by `draw` and then added. Call `flush` to write the last ones to
        disk.
        """
        image = self._images[index]
        if not isinstance(image.path, Path):
            stamp = -1, 0
        elif image.path.exists():
            status = image.path.stat()
            stamp = status.st_size, status.st_mtime_ns
        else:
            return draw()  # it reports the missing file
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
        """Reads a row onto the canvas. Returns the image's size, or `None`, and the key of `counts`."""
        try:
            row = array[index].read().result()
        except ValueError:  # a wrong checksum, or a damaged index
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
        """Writes all pending rows to the store. Raises an `OSError` with a remedy if that fails."""
        with self._writing:
            if self._part_size:
                self._commit()

    def _new_part(self) -> None:
        """Opens a new transaction: rows written from now on become visible when it is committed."""
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

    def _error(self, error: ValueError | str) -> OSError:
        return OSError(
            f"The cache {self._folder} cannot be used: {error}. Free up space or choose another folder. If it is "
            f"damaged, delete it: it will be rebuilt."
        )


def _spec(folder: Path, name: str, number: int, shape: tuple[int, ...]) -> dict[str, Any]:
    row = HEADER + shape[0] * shape[1] * shape[2]
    # LZ4 takes less time than reading the bytes that it saves, which are mostly the black padding of the canvases.
    compression = {"cname": "lz4", "clevel": 1, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
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
                {"name": "blosc", "configuration": compression},
                {"name": "crc32c"},
            ],
        },
    }
